"""Scales of blocks that make the error of what a layer gives small, and not only that of its weights.

For each block the scale is looked for among those that put its largest number near -8: for each, the numbers are
rounded and the scale is fitted to them by least squares, with every number's error weighted by how large the layer's
input there is on average, as in the importance matrices of llama.cpp.

Every processor has to come to the same choice, because a check computes it again. So all sums are made in one order.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

LOWEST, HIGHEST = -8, 7  # of a number in 4 bits
# What the number of the largest magnitude becomes, before it is clipped to the range.
DIVISORS = tuple(np.float32(-9.2 + 0.4 * step) for step in range(9))  # to -6
# Of a block's mean: a channel that a text never used counts a little, too.
_LEAST_WEIGHT = np.float32(0.01)
_AT_ONCE = 1 << 16  # numbers, so that a step's arrays stay in the processor's cache


def search_scales(
    matrix: Floats, importance: Floats, block: int
) -> tuple[npt.NDArray[np.uint8], Floats]:
    """A matrix in 4 bits.

    Args:
        matrix: [in, columns], finite, with whole blocks.
        importance: [in], not negative; the mean square of each input.
        block: numbers of a column that share a scale.

    Returns:
        The numbers [columns, blocks, block / 2], of a byte's two the first in the lower half, and scales [columns,
        blocks].
    """
    blocks, columns = matrix.shape[0] // block, matrix.shape[1]
    parts = matrix.reshape(blocks, block, columns)
    weights = _weights(importance.astype(np.float32).reshape(blocks, block, 1))
    numbers = np.empty(parts.shape, np.int8)
    scales = np.empty((blocks, columns), np.float32)
    for some in _slices(blocks, block * columns):
        numbers[some], scales[some] = _fitted(parts[some], weights[some])
    unsigned = (numbers - LOWEST).astype(np.uint8).transpose(2, 0, 1)
    packed: npt.NDArray[np.uint8] = unsigned[..., 0::2] | np.left_shift(unsigned[..., 1::2], 4)
    return packed, np.ascontiguousarray(scales.T)


def _slices(count: int, size: int) -> Iterator[slice]:
    step = max(1, _AT_ONCE // size)
    yield from (slice(start, start + step) for start in range(0, count, step))


def _weights(importance: Floats) -> Floats:
    """Relative to their block's mean; all the same where no input of a block was ever other than 0."""
    mean = _sum(importance) / np.float32(importance.shape[1])
    relative = importance / np.where(mean > 0, mean, np.float32(1))
    result: Floats = relative + _LEAST_WEIGHT
    return result


def _fitted(parts: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Whole numbers [blocks, block, columns] and scales [blocks, columns]."""
    largest = np.take_along_axis(parts, np.abs(parts).argmax(1, keepdims=True), 1)
    tiny = np.abs(largest) < np.finfo(np.float32).tiny
    relative = parts / np.where(tiny, np.float32(1), largest)
    weighted = relative * weights
    best = np.zeros(largest.shape, np.float32)
    numbers, fits = np.zeros(parts.shape, np.float32), best.copy()
    for divisor in DIVISORS:
        rounded = np.clip(np.rint(relative * divisor), LOWEST, HIGHEST)
        products, squares = _sum(rounded * weighted), _sum(rounded * rounded * weights)
        squares = np.where(squares > 0, squares, np.float32(1))
        explained = products * products / squares  # of the weighted sum of squares
        better = explained > best
        np.copyto(best, explained, where=better)
        np.copyto(fits, products / squares, where=better)
        np.copyto(numbers, rounded, where=better)
    return numbers, (fits * largest)[:, 0]


def _sum(values: Floats) -> Floats:
    """Over a block, in halves: one order of adding up whatever the processor."""
    while values.shape[1] > 1:
        half = values.shape[1] // 2
        values = values[:, :half] + values[:, half:]
    return values
