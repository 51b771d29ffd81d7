"""A tensor's bytes in a file, as an array that the operating system pages in on demand."""

from __future__ import annotations

import contextlib
import math
import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from peft_deploy.errors import CheckpointError
from peft_deploy.weights.source import DTYPES, Array


def map_array(
    path: Path, offset: int, dtype: str, shape: tuple[int, ...], *, fortran: bool = False
) -> Array:
    """A read-only view of one tensor in a file.

    Every call maps only the tensor's own pages, and they are given back when the array goes away:
    one map of the whole file would count every page ever touched as memory of the process.

    Args:
        path: the file.
        offset: where the data begins, in bytes; need not be a multiple of the item size.
        dtype: a key of :data:`~peft_deploy.weights.source.DTYPES`.
        shape: the dimensions.
        fortran: the first dimension varies fastest.

    Raises:
        CheckpointError: the file is shorter than it was, or cannot be read.
    """
    kind = DTYPES[dtype]
    count = math.prod(shape)
    if count == 0:
        return np.empty(shape, kind)
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    length = offset - start + count * kind.itemsize
    try:
        with path.open("rb") as file:
            view = _View(file.fileno(), length, offset=start, access=mmap.ACCESS_READ)
            view.path, view.start = path, start
    except (OSError, ValueError) as exc:
        raise CheckpointError(
            f"{path}: bytes {offset} to {start + length} cannot be read: {exc}",
            hint="has the file been replaced or cut while it was in use?",
        ) from exc
    flat = np.frombuffer(view, np.uint8, count * kind.itemsize, offset - start).view(kind)
    return flat.reshape(shape, order="F" if fortran else "C")


@dataclass(frozen=True)
class FileSpan:
    """A part of a file.

    Args:
        path: of the file.
        offset: of the part's first byte.
        nbytes: its length.
    """

    path: Path
    offset: int
    nbytes: int


class _View(mmap.mmap):
    """A map that knows what it maps."""

    path: Path
    start: int


def mapped_span(array: Array) -> FileSpan | None:
    """What part of a file an array is a view of, from its first element to its last one; None where it is not.

    Args:
        array: with strides that are not negative.
    """
    view = _view_of(array)
    if view is None or array.size == 0 or min(array.strides, default=0) < 0:
        return None
    first = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    offset = array.__array_interface__["data"][0] - first
    steps = zip(array.shape, array.strides, strict=True)
    nbytes = sum((length - 1) * stride for length, stride in steps) + array.itemsize
    return FileSpan(view.path, view.start + offset, nbytes)


def read_sparsely(array: Array) -> None:
    """Has the operating system read no more of a mapped file than the pages that are touched: for single elements."""
    view = _view_of(array)
    if view is not None and hasattr(mmap, "MADV_RANDOM"):
        with contextlib.suppress(OSError):  # a wish, no more
            view.madvise(mmap.MADV_RANDOM)


def _view_of(array: Array) -> _View | None:
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    return base if isinstance(base, _View) else None
