"""Fast conversions against numpy's own and ml_dtypes', to the bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_deploy.weights import DTYPES, Array
from peft_deploy.weights.half_floats import HALVES, narrow, turned, widen

TYPES = ["float16", "bfloat16"]
ALL = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)  # every number of 16 bits


def same(found: Array, wanted: Array) -> bool:
    """NaN included, whose payload is nobody's business."""
    nan = not_a_number(wanted)
    equal = found[~nan].tobytes() == wanted[~nan].tobytes()
    return equal and bool((not_a_number(found) == nan).all())


def not_a_number(values: Array) -> Array:
    with np.errstate(invalid="ignore"):  # ml_dtypes warns of signalling ones
        return np.isnan(values.astype(np.float32))


def finite(dtype: str) -> Array:
    values = ALL.view(DTYPES[dtype])
    with np.errstate(invalid="ignore"):
        return values[np.isfinite(values.astype(np.float32))]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("which", ["finite", "all"])
def test_every_number_becomes_float32_and_comes_back(dtype: str, which: str) -> None:
    values = finite(dtype) if which == "finite" else ALL.view(DTYPES[dtype])
    wide = np.full(values.shape, 7, np.float32)
    widen(values, wide)
    assert same(wide, values.astype(np.float32))
    back = np.zeros(values.shape, DTYPES[dtype])
    narrow(wide, back)
    assert same(back, values)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_what_lies_between_two_numbers_is_rounded_to_nearest_and_to_even(
    dtype: str, sign: int
) -> None:
    """The middles, what is next to them, and the numbers' own neighbours; up to what rounds to infinity."""
    positive = finite(dtype)
    positive = positive[: len(positive) // 2].astype(np.float64)
    last = 2 * positive[-1] - positive[-2]  # the next one, if there were one
    middles = (positive + np.append(positive[1:], last)) / 2
    exact = np.concatenate([positive, middles]).astype(np.float32)
    for near in (
        exact,
        np.nextafter(exact, np.float32(np.inf)),
        np.nextafter(exact, np.float32(0)),
    ):
        found = np.zeros(near.shape, DTYPES[dtype])
        narrow(near * np.float32(sign), found)
        with np.errstate(over="ignore"):
            assert same(found, (near * np.float32(sign)).astype(DTYPES[dtype]))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(TYPES),
    st.lists(st.floats(width=32), min_size=1, max_size=60),
    st.integers(0, 2**32 - 1),
)
def test_any_floats_are_rounded_like_numpy_does(
    dtype: str, values: list[float], seed: int
) -> None:
    bits = np.random.default_rng(seed).integers(0, 1 << 32, 300, np.uint32)
    array = np.concatenate([np.array(values, np.float32), bits.view(np.float32)])
    found = np.zeros(array.shape, DTYPES[dtype])
    narrow(array, found)
    with np.errstate(over="ignore", invalid="ignore"):
        assert same(found, array.astype(DTYPES[dtype]))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "shape", [(64, 300), (130, 257), (2, 1), (71, 40), (1, 5), (0, 4), (4, 0)]
)
@pytest.mark.parametrize("bad", [None, np.nan, -np.inf])
def test_a_matrix_is_turned_round(dtype: str, shape: tuple[int, int], bad: float | None) -> None:
    """Odd numbers of rows, which do not come in pairs; sizes beyond a band and a tile; parts of a larger matrix."""
    rng = np.random.default_rng(5)
    stored = rng.standard_normal((shape[1], shape[0] + 6)).astype(DTYPES[dtype])
    if bad is not None and stored.size:
        stored[-1, 0] = bad
    for start in (0, 1, 4):
        matrix = stored[:, start : start + shape[0]].T
        copy, wide = np.zeros(shape, DTYPES[dtype]), np.zeros(shape, np.float32)
        turned(matrix, copy)
        widen(matrix, wide)
        assert same(copy, np.ascontiguousarray(matrix))
        assert same(wide, matrix.astype(np.float32))


@pytest.mark.parametrize("dtype", TYPES)
def test_where_small_numbers_are_taken_for_zero_nothing_is_lost(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some libraries set a processor's flag that makes products with subnormal numbers 0."""

    def multiplied(_out: Array) -> None:
        raise AssertionError("products of subnormal numbers are not to be trusted")

    monkeypatch.setattr("peft_deploy.weights.half_floats._SUBNORMAL", np.array(0.0, np.float32))
    monkeypatch.setattr("peft_deploy.weights.half_floats._as_float32", multiplied)
    values = finite(dtype)
    wide = np.zeros(values.shape, np.float32)
    widen(values, wide)
    assert same(wide, values.astype(np.float32))
    pairs, wide = np.stack([values, values]).T.copy().T, np.zeros((2, len(values)), np.float32)
    widen(pairs, wide)
    assert same(wide, pairs.astype(np.float32))


def test_passes_over_more_than_one_part() -> None:
    values = np.random.default_rng(1).standard_normal(300_001).astype(np.float32)
    values[200_000] = np.inf  # one part is left to numpy
    for dtype in HALVES:
        found, back = np.zeros(values.shape, dtype), np.zeros_like(values)
        narrow(values, found)
        assert same(found, values.astype(dtype))
        widen(found, back)
        assert same(back, found.astype(np.float32))
