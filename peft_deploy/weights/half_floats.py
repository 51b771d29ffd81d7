"""Conversions between 16-bit floats and float32 in integer arithmetic on whole arrays.

numpy and ml_dtypes convert one number at a time, which takes longer than everything else that is done to a weight.
Here a conversion is a few passes of integer and float operations that processors do many of at once; the results are
the same to the bit. What those passes cannot carry (NaN, infinities, what overflows) is left to numpy.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from peft_deploy.weights.scratch import Scratch
from peft_deploy.weights.source import DTYPES, Array

FLOAT16, BFLOAT16 = DTYPES["float16"], DTYPES["bfloat16"]
HALVES = frozenset({FLOAT16, BFLOAT16})
# Numbers that are gone through at a time: few enough for what lies between two passes to stay in a cache, and so many
# that threads seldom wait for each other's turn in the interpreter.
_PASS = 1 << 18
_APART = 256  # places in the cache are shared by what lies multiples of a page apart
# A matrix is turned round in tiles: pairs of rows, as many as lie in a cache line or two, and columns.
_BAND_PAIRS, _TILE_COLUMNS = 32, 256

_INFINITY = {FLOAT16: 0x7C00, BFLOAT16: 0x7F80}
# The first number, as float32's bits, that passes do not carry: what rounds to float16's infinity, and infinity.
_TOO_LARGE = {FLOAT16: 0x477FF000, BFLOAT16: 0x7F800000}


def _bits(value: int, dtype: type[np.generic] = np.uint32) -> Array:
    """An operand of a pass: an array, because numpy takes a scalar's type to pieces at every call."""
    return np.array(value, dtype)


# Of float16 in float32's place, sign and all: the exponent then stands for a number 2^112 times as small.
_FLOAT16_BITS, _REBIASED = _bits(0x8FFFE000), np.array(2.0**112, np.float32)
_SIGN, _MAGNITUDE, _EXPONENT = _bits(0x8000), _bits(0x7FFFFFFF), _bits(0x7F800000)
_LOW_MAGNITUDE = _bits(0x7FFF, np.uint16)
_UPPER_HALF, _LAST, _ALMOST_HALF = _bits(0xFFFF0000), _bits(1), _bits(0x7FFF)
_3, _13, _16 = _bits(3, np.int32), _bits(13), _bits(16)
# Smallest normal float16, as float32's bits; 2^13 in exponents; what is left of both in the result's exponent.
_SMALLEST, _THIRTEEN, _EXCESS = _bits(113 << 23), _bits(13 << 23), _bits(126 << 10)
# Smaller than float32's normal numbers. Some libraries have a thread take such numbers for zero.
_SUBNORMAL = np.array(1e-40, np.float32)
_tile, _turning, _rounding, _magnitudes = Scratch(), Scratch(), Scratch(), Scratch()

Bits = npt.NDArray[np.uint32]


def widen(array: Array, out: Array) -> None:
    """Float16 or bfloat16 as float32.

    Args:
        array: in any memory order.
        out: float32 of its shape, in row-major order; gets the numbers.
    """
    if array.flags.c_contiguous:
        flat, result = array.reshape(-1), out.reshape(-1)
        for part in _parts(flat.size):
            _widen_part(flat[part], result[part])
        return
    pairs = _pairs_of_rows(array)
    if pairs is None or (array.dtype == FLOAT16 and not _keeps_subnormals()):
        out[...] = array
        return
    for rows, pair in _bands(pairs):
        first, second = out[rows][::2].view(np.uint32), out[rows][1::2].view(np.uint32)
        if array.dtype == BFLOAT16:
            np.left_shift(pair, _16, out=first)
            np.bitwise_and(pair, _UPPER_HALF, out=second)
        elif halves_finite(pair.view(np.uint16), array.dtype):
            signed = pair.view(np.int32), first.view(np.int32), second.view(np.int32)
            np.left_shift(pair, _16, out=first)
            np.right_shift(signed[1], _3, out=signed[1])
            np.right_shift(signed[0], _3, out=signed[2])
            _as_float32(out[rows])
        else:
            out[rows] = array[rows]


def turned(array: Array, out: Array) -> None:
    """A matrix of 16-bit numbers, transposed as it is in memory, in row-major order.

    Args:
        array: [rows, columns], its columns one behind the other in memory.
        out: of its shape and type, in row-major order; gets the numbers.
    """
    pairs = _pairs_of_rows(array)
    if pairs is None:
        out[...] = array
        return
    numbers = out.view(np.uint16)
    for rows, pair in _bands(pairs):
        np.copyto(numbers[rows][::2], pair, casting="unsafe")
        np.right_shift(pair, _16, out=pair)
        np.copyto(numbers[rows][1::2], pair, casting="unsafe")


def narrow(array: Array, out: Array) -> None:
    """Float32 as float16 or bfloat16, each number rounded once to the nearest, to even when two are as near.

    Numbers beyond the type's range become infinite, without a warning.

    Args:
        array: float32, in row-major order.
        out: of its shape, in row-major order; gets the numbers.
    """
    rounded = _to_float16 if out.dtype == FLOAT16 else _to_bfloat16
    flat, result = array.reshape(-1), out.reshape(-1)
    scratch = _rounding.array((2, min(flat.size, _PASS) + _APART), np.dtype(np.uint32))
    for part in _parts(flat.size):
        bits = flat[part].view(np.uint32)
        first, second = scratch[:, : bits.size]
        np.bitwise_and(bits, _MAGNITUDE, out=first)
        if first.max() >= _TOO_LARGE[out.dtype]:
            with np.errstate(over="ignore", invalid="ignore"):
                result[part] = flat[part]
        else:
            rounded(bits, first, second)
            np.copyto(result[part].view(np.uint16), first, casting="unsafe")


def halves_finite(bits: npt.NDArray[np.uint16], dtype: np.dtype[np.generic]) -> bool:
    """Whether no number of 16 bits is NaN or infinite: those have all bits of the exponent.

    Args:
        bits: of the numbers.
        dtype: float16 or bfloat16.
    """
    magnitudes = _magnitudes.array(bits.shape, bits.dtype)
    np.bitwise_and(bits, _LOW_MAGNITUDE, out=magnitudes)
    return bool(magnitudes.max(initial=0) < _INFINITY[dtype])


def _to_float16(bits: Bits, magnitudes: Bits, scratch: Bits) -> None:
    """Rounds ``magnitudes`` in place; the lower halves are the result.

    2^13 times a number's power of two is added to the number (times the smallest normal one's for what is smaller):
    the sum's last bit is worth what float16's last bit is worth, so that the addition rounds.
    """
    np.bitwise_and(magnitudes, _EXPONENT, out=scratch)
    np.maximum(scratch, _SMALLEST, out=scratch)
    np.add(scratch, _THIRTEEN, out=scratch)
    np.add(magnitudes.view(np.float32), scratch.view(np.float32), out=magnitudes.view(np.float32))
    np.subtract(magnitudes, scratch, out=magnitudes)
    np.right_shift(scratch, _13, out=scratch)
    np.add(magnitudes, scratch, out=magnitudes)
    np.subtract(magnitudes, _EXCESS, out=magnitudes)
    np.right_shift(bits, _16, out=scratch)
    np.bitwise_and(scratch, _SIGN, out=scratch)
    np.bitwise_or(magnitudes, scratch, out=magnitudes)


def _to_bfloat16(bits: Bits, result: Bits, scratch: Bits) -> None:
    """The upper halves, rounded: half of the last bit is added, a little less where the bit is 0."""
    np.right_shift(bits, _16, out=scratch)
    np.bitwise_and(scratch, _LAST, out=scratch)
    np.add(scratch, _ALMOST_HALF, out=scratch)
    np.add(bits, scratch, out=result)
    np.right_shift(result, _16, out=result)


def _widen_part(part: Array, out: Array) -> None:
    bits = out.view(np.int32)
    if part.dtype == BFLOAT16:
        np.copyto(bits, part.view(np.int16))
        np.left_shift(bits, _16.view(np.int32), out=bits)
    elif _keeps_subnormals() and halves_finite(part.view(np.uint16), part.dtype):
        np.copyto(bits, part.view(np.int16))  # the sign fills the upper half
        np.left_shift(bits, _13.view(np.int32), out=bits)
        _as_float32(out)
    else:
        out[...] = part


def _as_float32(out: Array) -> None:
    """Float16 whose last bit is where float32 has that of its value; its sign is in all bits before its first."""
    bits = out.view(np.uint32)
    np.bitwise_and(bits, _FLOAT16_BITS, out=bits)
    np.multiply(out, _REBIASED, out=out)


def _pairs_of_rows(array: Array) -> Bits | None:
    """A matrix whose columns lie one behind the other, as [rows / 2, columns] of two numbers each, the first in the
    lower half; None where it does not lie so.
    """
    stored = array.T
    if array.ndim != 2 or len(array) % 2 or not array.size or stored.strides[1] != array.itemsize:
        return None
    pairs: Bits = stored.view(np.uint32)
    return pairs.T if pairs.flags.aligned else None


def _bands(pairs: Bits) -> Iterator[tuple[slice, Array]]:
    """Some rows of the matrix and the pairs there, in row-major order; an array that may be changed."""
    height, width = pairs.shape
    scratch = _turning.array((min(_BAND_PAIRS, height), width), np.dtype(np.uint32))
    for start in range(0, height, _BAND_PAIRS):
        stop = min(start + _BAND_PAIRS, height)
        band = scratch[: stop - start]
        for column in range(0, width, _TILE_COLUMNS):
            columns = slice(column, column + _TILE_COLUMNS)
            stored = pairs[start:stop, columns].T
            # Not turned round where it lies: lines of a matrix whose width is a power of two share a few places in
            # the cache and drive each other out.
            tile = _tile.array(stored.shape, stored.dtype)
            np.copyto(tile, stored)
            band[:, columns] = tile.T
        yield slice(2 * start, 2 * stop), band


def _parts(size: int) -> Iterator[slice]:
    return (slice(start, min(start + _PASS, size)) for start in range(0, size, _PASS))


def _keeps_subnormals() -> bool:
    return bool(_SUBNORMAL * _REBIASED)
