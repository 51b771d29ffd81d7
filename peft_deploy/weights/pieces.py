"""Tensors in pieces of a few megabytes that are computed side by side and handed on in order.

What is larger than memory never lies in it whole, and reading, merging, rounding and turning round use all cores:
numpy lets go of the interpreter while it computes. Matrix products of single pieces run in one thread each meanwhile:
with several for each of them, threads that wait for others took half of all computing time (OpenBLAS, two cores).
"""

from __future__ import annotations

import functools
import os
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from threading import Lock
from types import TracebackType
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from threadpoolctl import ThreadpoolController

from peft_deploy.weights.blocks import contiguous, row_blocks
from peft_deploy.weights.source import DTYPES, Array, TensorInfo, TensorSource

T = TypeVar("T")
Task = Callable[[], T]

_WORKERS = max(1, min(4, os.cpu_count() or 1))
_AHEAD = 4 * _WORKERS  # tasks that are begun and not yet handed on


@runtime_checkable
class PieceSource(TensorSource, Protocol):
    """A source that can compute a part of a tensor without the rest."""

    def pieces(self, name: str, axis: int = 0, height: int | None = None) -> Iterator[Task[Array]]:
        """One tensor in pieces; each call gives one of them, and they may be made in any order.

        Args:
            name: the tensor's.
            axis: 0 for rows, each piece in row-major order; 1 for columns of a matrix, in any memory order.
            height: so many rows or columns in a piece, the last one excepted; a few megabytes when None. Only for
                what is computed row by row or column by column: a ValueError elsewhere.
        """
        ...


def pieces_of(
    source: TensorSource, name: str, axis: int = 0, height: int | None = None
) -> Iterator[Task[Array]]:
    """One tensor in pieces, read whole where its source knows no better.

    Args:
        source: of the tensor.
        name: the tensor's.
        axis: see :meth:`PieceSource.pieces`.
        height: likewise.

    Yields:
        What computes the next rows or columns of it.
    """
    if isinstance(source, PieceSource):
        yield from source.pieces(name, axis, height)
    else:
        yield from along(axis, partial(pieces_of_array, height=height), source.read(name))


def along(
    axis: int, pieces: Callable[[Array], Iterator[Task[Array]]], array: Array
) -> Iterator[Task[Array]]:
    """Pieces of rows, or of columns: those are the rows of the transposed matrix, turned round.

    Args:
        axis: 0 or 1.
        pieces: of an array's rows.
        array: what they are to be made of.
    """
    if axis == 0:
        return pieces(array)
    return (partial(_transposed, task) for task in pieces(array.T))


def _transposed(task: Task[Array]) -> Array:
    return task().T


def pieces_of_array(
    array: Array,
    make: Callable[[Array], Array] = contiguous,
    itemsize: int = 0,
    height: int | None = None,
) -> Iterator[Task[Array]]:
    """An array's rows in pieces.

    Args:
        array: in any memory order.
        make: makes of some of its rows what is wanted, in row-major order.
        itemsize: bytes of an element of the widest type on the way; the array's own when smaller.
        height: see :meth:`PieceSource.pieces`.
    """
    array = np.atleast_1d(array)
    for rows in row_blocks(array.shape, max(itemsize, array.itemsize), height):
        yield partial(make, array[rows])  # a view: nothing is read yet


def joined(info: TensorInfo, pieces: Iterable[Array], axis: int = 0) -> Array:
    """A whole tensor of its pieces, taken one at a time.

    Args:
        info: of the tensor.
        pieces: in order, along ``axis``.
        axis: 0 for rows, 1 for columns.
    """
    result, start = np.empty(info.shape, DTYPES[info.dtype]), 0
    rows = result if axis == 0 else result.T
    for piece in pieces:
        part = piece if axis == 0 else piece.T
        rows[start : start + len(part)] = part
        start += len(part)
    return result


def in_order(tasks: Iterable[Task[T]]) -> Generator[T, None, None]:
    """The results of tasks, in their order, computed on all cores a few ahead of who takes them.

    Args:
        tasks: are taken one by one, as there is room; none of them may use this function itself.
    """
    waiting: deque[Future[T]] = deque()
    with _one_blas_thread:
        pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="peft-deploy")
        try:
            for task in tasks:
                waiting.append(pool.submit(task))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


class _OneBlasThread:
    """While anybody is inside, a product of numpy's runs in one thread; afterwards in as many as before."""

    def __init__(self) -> None:
        self._lock, self._inside, self._limit = Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:  # else it is limited already, and what it was before is known
                self._limit.enter_context(_numpys_blas().limit(limits=1))
            self._inside += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._limit.close()


_one_blas_thread = _OneBlasThread()


@functools.cache
def _numpys_blas() -> ThreadpoolController:
    with warnings.catch_warnings():
        # Of other libraries in the process that do not get on with each other.
        warnings.simplefilter("ignore")
        return ThreadpoolController().select(internal_api="openblas")
