"""A tensor's bytes in a file, as an array that the operating system pages in on demand."""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
from concurrent.futures import ThreadPoolExecutor
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
            view = mmap.mmap(file.fileno(), length, offset=start, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as exc:
        raise CheckpointError(
            f"{path}: bytes {offset} to {start + length} cannot be read: {exc}",
            hint="has the file been replaced or cut while it was in use?",
        ) from exc
    flat = np.frombuffer(view, np.uint8, count * kind.itemsize, offset - start).view(kind)
    return flat.reshape(shape, order="F" if fortran else "C")


def read_ahead(array: Array) -> None:
    """Has the operating system read what an array maps, before it is asked for; returns at once.

    Nothing happens to one that maps no file.
    """
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_WILLNEED"):
        _reader().submit(_read_ahead, base)


def _read_ahead(view: mmap.mmap) -> None:
    with contextlib.suppress(
        OSError, ValueError
    ):  # a wish, no more; also of what is closed by now
        view.madvise(mmap.MADV_WILLNEED)


@functools.cache
def _reader() -> ThreadPoolExecutor:
    # In a thread of its own: the call takes as long as it takes to make room for the pages.
    return ThreadPoolExecutor(1, thread_name_prefix="peft-deploy-read-ahead")
