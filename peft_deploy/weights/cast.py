"""Conversion between floating-point types, refusing what the target type cannot hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from peft_deploy.errors import CheckpointError
from peft_deploy.weights.blocks import contiguous
from peft_deploy.weights.half_floats import HALVES, halves_finite, narrow
from peft_deploy.weights.pieces import Task, in_order, pieces_of_array
from peft_deploy.weights.source import DTYPES, FLOATING, Array, TensorInfo, TensorSource

LARGEST = {"bfloat16": 3.3895313892515355e38, "float16": 65504.0, "float32": 3.4028234663852886e38}


def check_float(dtype: str) -> str:
    """The name of a floating-point type, as given.

    Raises:
        ValueError: it is none.
    """
    if dtype not in FLOATING:
        raise ValueError(f"{dtype} is not one of {', '.join(sorted(FLOATING))}")
    return dtype


def cast_array(array: Array, dtype: str, *, name: str = "the tensor") -> Array:
    """The array in another floating-point type, each value rounded once, to the nearest.

    Args:
        array: any array; one of integers or booleans is returned as it is.
        dtype: the target, a floating-point key of :data:`~peft_deploy.weights.source.DTYPES`.
        name: what to call the array in an error.

    Returns:
        The array itself when nothing has to change, otherwise a new one in row-major order.

    Raises:
        CheckpointError: finite values would become infinite.
    """
    target = DTYPES[check_float(dtype)]
    if array.dtype == target or not is_float(array):
        return array
    if array.ndim == 0:
        return cast_array(array.reshape(1), dtype, name=name).reshape(())
    pieces = list(cast_pieces(array, dtype, name=name))
    if len(pieces) == 1:  # nothing to share among threads
        return pieces[0]()
    result = np.empty(array.shape, target)
    start = 0
    for block in in_order(pieces):
        result[start : start + len(block)] = block
        start += len(block)
    return result


def cast_pieces(
    array: Array, dtype: str, *, name: str = "the tensor", height: int | None = None
) -> Iterator[Task[Array]]:
    """The rows of :func:`cast_array`'s result in pieces of a height, in row-major order; the rest as there."""
    target = DTYPES[check_float(dtype)]
    if array.dtype == target or not is_float(array):
        return pieces_of_array(array, height=height)

    def make(rows: Array) -> Array:
        if is_wider(target, rows.dtype):
            return contiguous(rows, target)
        single = np.dtype(np.float32) if rows.dtype in HALVES else rows.dtype
        return cast_block(contiguous(rows, single), target, name)

    return pieces_of_array(array, make, target.itemsize, height)


def cast_block(block: Array, target: np.dtype[np.generic], name: str) -> Array:
    """Like :func:`cast_array`, in one go."""
    result = round_to(block, target)
    if is_wider(target, block.dtype):
        return result
    if all_finite(result):
        return result
    lost = ~np.isfinite(result) & np.isfinite(block)
    if lost.any():
        worst = np.abs(block[lost].astype(np.float64)).max()
        raise CheckpointError(
            f"{name}: {int(lost.sum())} values are too large for {target.name}, the largest is "
            f"{worst:.4g} and the limit {LARGEST[target.name]:.4g}",
            hint="use bfloat16 or float32",
        )
    return result


def is_wider(target: np.dtype[np.generic], source: np.dtype[np.generic]) -> bool:
    """Whether every value of one floating-point type has a place in another."""
    return target.itemsize >= source.itemsize and target != np.float16


def round_to(block: Array, target: np.dtype[np.generic]) -> Array:
    """Rounds each element once to the nearest of the target type, to even when two are as near.

    Values beyond the type's range become infinite, without a warning.
    """
    if block.dtype == target:
        return block
    result = np.empty(block.shape, target)
    round_into(result, block)
    return result


def round_into(out: Array, block: Array) -> None:
    """Like :func:`round_to`, into another array."""
    flat = block.flags.c_contiguous and out.flags.c_contiguous
    if flat and block.dtype == np.float32 and out.dtype in HALVES:
        narrow(block, out)
        return
    with np.errstate(over="ignore", invalid="ignore"):
        if block.dtype == np.float64 and out.dtype == DTYPES["bfloat16"]:
            block = _odd_float32(block)
        out[...] = block


def _odd_float32(block: Array) -> Array:
    """Float64 as float32, inexact values cut off and with their last bit set (rounding to odd).

    ml_dtypes makes bfloat16 of float64 by way of float32 and so rounds twice. With the lost bits
    kept alive in the last one, the second rounding comes out as if it were the only one.
    """
    single = block.astype(np.float32)
    back = single.astype(np.float64)
    bits = single.view(np.uint32) - (np.abs(back) > np.abs(block)).astype(np.uint32)
    odd: Array = (bits | (back != block)).view(np.float32)
    return odd


def all_finite(array: Array) -> bool:
    """Whether no element is NaN or infinite; of 16-bit types ten times faster than numpy's ``isfinite``."""
    if array.dtype in HALVES:
        return halves_finite(array.view(np.uint16), array.dtype)
    return bool(np.isfinite(array).all())


def is_float(array: Array) -> bool:
    """Whether the elements are floating-point numbers, bfloat16 included."""
    return any(array.dtype == DTYPES[name] for name in FLOATING)


class CastTensors:
    """Another source with its floating-point tensors in one type, converted as they are read.

    Args:
        source: where the tensors come from.
        dtype: the type that they get; integers and booleans stay as they are.
    """

    def __init__(self, source: TensorSource, dtype: str) -> None:
        self._source = source
        self._dtype = check_float(dtype)

    def names(self) -> Sequence[str]:
        """The source's names."""
        return self._source.names()

    def info(self, name: str) -> TensorInfo:
        """Type after conversion, and shape."""
        info = self._source.info(name)
        dtype = self._dtype if info.dtype in FLOATING else info.dtype
        return TensorInfo(name, dtype, info.shape)

    def read(self, name: str) -> Array:
        """One tensor, converted.

        Raises:
            CheckpointError: a value is too large for the type.
        """
        return cast_array(self._source.read(name), self._dtype, name=name)
