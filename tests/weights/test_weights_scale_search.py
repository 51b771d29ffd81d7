"""Scales that are searched: blocks are closer where it matters than when rounded to nearest, and apart from others."""

from __future__ import annotations

import numpy as np
import pytest

from peft_deploy.weights import BlockQuantized
from peft_deploy.weights.block_quantized import BLOCK, QUANTIZED, SCALES

SHAPES = [(64, 5), (33, 70), (20, 3), (96, 1030)]


def matrix(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def importance(size: int) -> np.ndarray:
    """A few inputs are much larger than others, as in real models."""
    return np.random.default_rng(9).lognormal(sigma=2, size=size).astype(np.float32)


def decoded(storage: BlockQuantized, weight: np.ndarray) -> np.ndarray:
    return storage.decode(storage.encode(weight, "w"), weight.shape)


def block_errors(found: np.ndarray, weight: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[blocks, out]: what each block adds to the error of the layer's result, were its inputs independent."""
    errors = (found.astype(np.float64) - weight) ** 2 * weights[:, None]
    return np.add.reduceat(errors, np.arange(0, len(weight), BLOCK))


@pytest.mark.parametrize("shape", SHAPES)
def test_errors_that_matter_are_smaller(shape: tuple[int, int]) -> None:
    weight, weights = matrix(shape), importance(shape[0])
    searched = block_errors(
        decoded(BlockQuantized(4, importance=weights), weight), weight, weights
    )
    nearest = block_errors(decoded(BlockQuantized(4), weight), weight, weights)
    assert searched.sum() < 0.8 * nearest.sum()
    assert np.mean(searched <= nearest * 1.001 + 1e-10) > 0.95  # the candidates are a grid


def test_what_a_text_never_used_counts_only_where_nothing_else_does() -> None:
    weight, weights = matrix((64, 40)), np.zeros(64, np.float32)
    weights[5] = 1e-20
    found = decoded(BlockQuantized(4, importance=weights), weight)
    first, second = np.abs(found - weight)[:32], np.abs(found - weight)[32:]
    assert first[5].mean() < 0.3 * first.mean()
    plain = decoded(BlockQuantized(4, importance=np.ones(64, np.float32)), weight)
    np.testing.assert_allclose(found[32:], plain[32:], rtol=1e-5)
    assert second.mean() < first.mean()


def test_columns_do_not_depend_on_each_other() -> None:
    left, right = matrix((64, 40)), matrix((64, 24), 1)
    storage = BlockQuantized(4, importance=importance(64))
    whole = storage.encode(np.concatenate([left, right], 1), "w")
    for name, part in whole.items():
        apart = [storage.encode(side, "w")[name] for side in (left, right)]
        np.testing.assert_array_equal(part, np.concatenate(apart))


def test_rows_of_a_table_are_columns_of_its_transpose() -> None:
    table, weights = matrix((70, 64)), importance(64)
    by_rows = BlockQuantized(4, rows=True, importance=weights).encode(table, "w")
    by_columns = BlockQuantized(4, importance=weights).encode(table.T, "w")
    for name in (QUANTIZED, SCALES):
        np.testing.assert_array_equal(by_rows[name], by_columns[name])


@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-20, 1e30])
def test_blocks_of_any_magnitude_are_kept(scale: float) -> None:
    weight = (matrix((64, 6)).astype(np.float64) * scale).astype(np.float32)
    found = decoded(BlockQuantized(4, importance=importance(64)), weight)
    assert np.isfinite(found).all()
    assert np.abs(found).max() <= 1.2 * np.abs(weight).max()
    if scale > 1e-37:  # smaller ones may become 0
        assert np.abs(found - weight).mean() < 0.2 * np.abs(weight).mean()


def test_last_bits_of_weights_change_next_to_nothing() -> None:
    """What :func:`~peft_deploy.parity.stored_weights.difference` allows for sums that another processor adds up."""
    weight = matrix((512, 600))
    noise = np.random.default_rng(2).choice([-1.0, 0.0, 1.0], weight.shape) * 2.0**-23
    storage = BlockQuantized(4, importance=importance(512))
    one, other = (
        storage.encode(w.astype(np.float32), "w") for w in (weight, weight * (1 + noise))
    )
    assert np.mean(one[QUANTIZED] != other[QUANTIZED]) < 1e-3
    far = np.abs(one[SCALES] - other[SCALES]) > 1e-5 * np.abs(one[SCALES]).max()
    assert 0 < far.mean() < 5e-3
    ratios = one[SCALES][far] / other[SCALES][far]
    assert ratios.min() > 0.5 and ratios.max() < 2


def test_importance_has_to_fit() -> None:
    with pytest.raises(ValueError, match="64 inputs"):
        BlockQuantized(4, importance=importance(63)).encode(matrix((64, 2)), "w")
    with pytest.raises(ValueError, match="not for 8"):
        BlockQuantized(8, importance=importance(64))
