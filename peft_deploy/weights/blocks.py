"""Large arrays in pieces: conversions that never need a second copy of the whole."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from peft_deploy.weights.half_floats import HALVES, turned, widen
from peft_deploy.weights.source import Array

# Merged in float32 and rounded to 16 bits, half of that are left, which is still beyond the 4 MiB from which on numpy
# asks for huge pages: those cost next to nothing to get, small ones as much as everything that is computed in them.
BLOCK_BYTES = 16 << 20
# Blocks of more rows than this have a multiple of them. What is computed so many rows at a time (a product rounds
# differently for another number of rows) is then the same to the bit, however a tensor is cut.
BAND_ROWS = 64
# Numpy copies a transposed matrix row by row, with a cache miss for every element; these tiles of
# it fit the cache (three times faster for 2048 x 4096 float32, measured).
TILE_ROWS, TILE_COLUMNS = 256, 64


def block_height(shape: tuple[int, ...], itemsize: int) -> int:
    """How many rows make a block of at most 16 MiB: a multiple of :data:`BAND_ROWS`, or fewer, but at least one.

    Args:
        shape: of the array, at least one dimension.
        itemsize: bytes of one element, of the widest type that a block is converted to.
    """
    row_bytes = math.prod(shape[1:]) * itemsize
    rows = max(1, BLOCK_BYTES // max(1, row_bytes))
    return rows - rows % BAND_ROWS if rows > BAND_ROWS else rows


def row_blocks(
    shape: tuple[int, ...], itemsize: int, height: int | None = None
) -> Iterator[slice]:
    """Slices of the first dimension, each of at most 16 MiB or one row where ``height`` does not say otherwise.

    Args:
        shape: of the array, at least one dimension.
        itemsize: see :func:`block_height`.
        height: rows of a slice, where the caller has reasons for another number.
    """
    rows = block_height(shape, itemsize) if height is None else height
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))


def contiguous(array: Array, dtype: np.dtype[np.generic] | None = None) -> Array:
    """The array itself when it is in row-major order and of the type, otherwise a copy that is.

    Args:
        array: in any memory order.
        dtype: to convert to on the way, which costs nothing beside turning a matrix round; the array's own when None.
    """
    dtype = array.dtype if dtype is None else dtype
    if array.flags.c_contiguous and array.dtype == dtype:
        return array
    result = np.empty(array.shape, dtype)
    fill(result, array)
    return result


def fill(out: Array, array: Array) -> None:
    """Copies an array's elements, turned round and converted where need be.

    Args:
        out: of the array's shape and any type, in row-major order; gets the elements.
        array: in any memory order.
    """
    if array.dtype in HALVES and out.dtype == np.float32:
        widen(array, out)
    elif array.flags.c_contiguous or array.ndim != 2:
        out[...] = array
    elif array.dtype in HALVES and out.dtype == array.dtype:
        turned(array, out)
    else:
        for i in range(0, array.shape[0], TILE_ROWS):
            for j in range(0, array.shape[1], TILE_COLUMNS):
                tile = slice(i, i + TILE_ROWS), slice(j, j + TILE_COLUMNS)
                out[tile] = array[tile]


def contiguous_blocks(array: Array) -> Iterator[Array]:
    """The array's elements in row-major order, in pieces of a few megabytes.

    Yields:
        Arrays in row-major order; views of ``array`` where that is possible.
    """
    if array.ndim == 0 or array.flags.c_contiguous:
        yield np.ascontiguousarray(array)
        return
    for rows in row_blocks(array.shape, array.dtype.itemsize):
        yield contiguous(array[rows])
