from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_deploy.errors import AdapterError
from peft_deploy.weights import DTYPES, LoraPair, contiguous, lora_delta, merge_weight
from peft_deploy.weights.blocks import BLOCK_BYTES

# Half the distance from 1 to the next number, and the smallest number, of each type.
ROUNDING = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SMALLEST = {"float64": 0.0, "float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}


def draw_case(
    seed: int, rows: int, columns: int, rank: int, dtype: str, scaling: float = 0.75
) -> tuple[np.ndarray, LoraPair]:
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((rows, columns)).astype(DTYPES[dtype])
    # B far from zero: the change is as large as the weight
    A = rng.standard_normal((rows, rank)).astype(np.float32)
    B = (rng.standard_normal((rank, columns)) + 0.5).astype(np.float32)
    return W, LoraPair(A, B, scaling)


def exact(W: np.ndarray, pair: LoraPair) -> tuple[np.ndarray, np.ndarray]:
    """The merged weight in float64, and the sum of the absolute values of what was added up."""
    A, B = pair.A.astype(np.float64), pair.B.astype(np.float64)
    merged = W.astype(np.float64) + pair.scaling * (A @ B)
    return merged, np.abs(W.astype(np.float64)) + abs(pair.scaling) * (np.abs(A) @ np.abs(B))


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    rank=st.integers(1, 9),
    scaling=st.sampled_from([2.0, 0.75, -1.3, 16 / 11]),
    dtype=st.sampled_from(["float64", "float32", "float16", "bfloat16"]),
    order=st.sampled_from(["C", "F"]),
)
def test_merging_is_the_exact_result_rounded_once(
    seed: int, rows: int, columns: int, rank: int, scaling: float, dtype: str, order: str
) -> None:
    W, pair = draw_case(seed, rows, columns, rank, dtype, scaling)
    W = np.array(W, order=order)
    before = W.tobytes()
    merged = merge_weight(W, pair)
    assert merged.dtype == W.dtype
    assert merged.flags.c_contiguous
    assert W.tobytes() == before
    truth, magnitude = exact(W, pair)
    accumulation = ROUNDING["float64" if dtype == "float64" else "float32"]
    allowed = (
        (rank + 4) * accumulation * magnitude + ROUNDING[dtype] * np.abs(truth) + SMALLEST[dtype]
    )
    assert (np.abs(merged.astype(np.float64) - truth) <= allowed).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_bound_above_tells_wrong_merges_apart(dtype: str) -> None:
    W, pair = draw_case(3, 24, 24, 4, dtype)
    truth, _ = exact(W, pair)
    wrong = {
        "left out": W.astype(np.float64),
        "scaled by 1": exact(W, LoraPair(pair.A, pair.B, 1.0))[0],
        "transposed": exact(W, LoraPair(pair.B.T, pair.A.T, pair.scaling))[0],
        "subtracted": exact(W, LoraPair(pair.A, pair.B, -pair.scaling))[0],
    }
    right = np.abs(merge_weight(W, pair).astype(np.float64) - truth).max()
    for name, values in wrong.items():
        assert np.abs(values - truth).max() > 20 * right, name


@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from(["float16", "bfloat16"]))
def test_sixteen_bits_are_the_rounded_float32_result(seed: int, dtype: str) -> None:
    W, pair = draw_case(seed, 17, 13, 3, dtype)
    wide = merge_weight(W, pair, dtype="float32")
    assert wide.dtype == np.float32
    assert merge_weight(W, pair).tobytes() == wide.astype(DTYPES[dtype]).tobytes()


def test_merging_into_another_type_rounds_once() -> None:
    """1 + 2**-8 + 2**-13 is nearer to the bfloat16 above 1, but as a float16 half way to it."""
    W = np.array([[1.0]], np.float32)
    pair = LoraPair(np.array([[1.0]], np.float32), np.array([[2**-8 + 2**-13]], np.float32), 1.0)
    assert float(merge_weight(W, pair, dtype="bfloat16")[0, 0]) == 1 + 2**-7
    assert float(merge_weight(W, pair, dtype="float16")[0, 0]) == 1 + 2**-8


def test_sixteen_bit_factors_are_multiplied_in_float32() -> None:
    rng = np.random.default_rng(5)
    A = rng.standard_normal((32, 8)).astype(DTYPES["bfloat16"])
    B = rng.standard_normal((8, 48)).astype(DTYPES["bfloat16"])
    W = rng.standard_normal((32, 48)).astype(np.float32)
    merged = merge_weight(W, LoraPair(A, B, 2.0))
    truth, magnitude = exact(W, LoraPair(A, B, 2.0))
    assert (np.abs(merged - truth) <= 16 * ROUNDING["float32"] * magnitude).all()


def test_the_delta_is_the_change() -> None:
    W, pair = draw_case(1, 30, 20, 4, "float64")
    assert lora_delta(pair).dtype == np.float32
    wide = LoraPair(pair.A.astype(np.float64), pair.B, pair.scaling)
    assert lora_delta(wide).dtype == np.float64
    assert np.allclose(W + lora_delta(wide), merge_weight(W, pair), rtol=0, atol=1e-13)
    assert np.abs(lora_delta(pair)).max() > 1


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_large_weight_is_merged_in_blocks(order: str) -> None:
    rows, columns = 8192, 2048
    rng = np.random.default_rng(0)
    W = np.empty((rows, columns), np.float16, order=order)
    W[:] = 0.5
    A = rng.standard_normal((rows, 4)).astype(np.float32)
    B = rng.standard_normal((4, columns)).astype(np.float32)
    pair = LoraPair(A, B, 0.5)
    tracemalloc.start()
    try:
        merged = merge_weight(W, pair)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < merged.nbytes + 6 * BLOCK_BYTES
    for row in (0, 1023, 1024, 5000, rows - 1):  # on both sides of a border between blocks
        expected = (np.float32(0.5) + np.float32(0.5) * (A[row] @ B)).astype(np.float16)
        assert np.allclose(merged[row], expected, rtol=2**-10, atol=2**-20)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_factor_that_is_not_finite_is_refused(bad: float, factor: str) -> None:
    W, pair = draw_case(2, 6, 5, 2, "float32")
    getattr(pair, factor)[1, 1] = bad
    with pytest.raises(AdapterError, match=rf"{factor} of layers\.3\.q holds 1 values"):
        merge_weight(W, pair, name="layers.3.q")


def test_a_result_that_is_not_finite_is_refused() -> None:
    W, pair = draw_case(2, 6, 5, 2, "float16")
    large = LoraPair(pair.A * 1e3, pair.B * 1e3, 1.0)
    with pytest.raises(AdapterError, match=r"q: the merged weight is not finite in float16"):
        merge_weight(W, large, name="q")
    assert np.isfinite(merge_weight(W, large, dtype="float32")).all()


def test_a_base_that_is_not_finite_is_told_apart() -> None:
    W, pair = draw_case(2, 6, 5, 2, "bfloat16")
    W[3, 3] = np.nan
    with pytest.raises(AdapterError, match="q: the base weight itself holds a NaN"):
        merge_weight(W, pair, name="q")


def test_a_weight_of_another_shape_is_refused_with_both() -> None:
    W, pair = draw_case(2, 6, 5, 2, "float32")
    with pytest.raises(AdapterError, match=r"q: the weight is float32 \[5, 6\].*\[6, 5\]"):
        merge_weight(W.T, pair, name="q")


def test_a_quantized_weight_is_refused() -> None:
    _, pair = draw_case(2, 6, 5, 2, "float32")
    with pytest.raises(AdapterError, match="the weight is int8"):
        merge_weight(np.ones((6, 5), np.int8), pair)


def test_an_unknown_target_type_is_refused() -> None:
    W, pair = draw_case(2, 6, 5, 2, "float32")
    with pytest.raises(ValueError, match="int8 is not one of"):
        merge_weight(W, pair, dtype="int8")


@pytest.mark.parametrize(
    ("a", "b"), [((4, 2), (3, 5)), ((4,), (4, 5)), ((4, 0), (0, 5)), ((1, 4, 2), (2, 5))]
)
def test_factors_that_do_not_fit_each_other(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(AdapterError, match="do not fit"):
        LoraPair(np.ones(a, np.float32), np.ones(b, np.float32), 1.0)


def test_factors_of_other_kinds() -> None:
    A, B = np.ones((4, 2), np.float32), np.ones((2, 5), np.float32)
    with pytest.raises(AdapterError, match="floating-point type, not int64 and float32"):
        LoraPair(A.astype(np.int64), B, 1.0)
    with pytest.raises(AdapterError, match="scaling is nan"):
        LoraPair(A, B, float("nan"))
    pair = LoraPair(A, B, 1.0)
    assert (pair.rank, pair.shape) == (2, (4, 5))


@pytest.mark.parametrize("shape", [(300, 500), (3, 4, 5), (1, 7), (0, 3)])
def test_contiguous_gives_the_same_elements(shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape)).reshape(shape)
    for view in (array, array.T, np.asfortranarray(array), array[::-1]):
        result = contiguous(view)
        assert result.flags.c_contiguous
        assert np.array_equal(result, view)
    assert contiguous(array) is array
