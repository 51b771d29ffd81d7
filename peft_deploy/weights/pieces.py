"""Tensors in pieces of a few megabytes that are computed side by side and handed on in order.

What is larger than memory never lies in it whole, and reading, merging, rounding and turning round use all cores:
numpy lets go of the interpreter while it computes.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np

from peft_deploy.weights.blocks import contiguous, row_blocks
from peft_deploy.weights.source import Array, TensorSource

T = TypeVar("T")
Task = Callable[[], T]

_WORKERS = max(1, min(4, os.cpu_count() or 1))
_AHEAD = 2 * _WORKERS  # tasks that are begun and not yet handed on


@runtime_checkable
class PieceSource(TensorSource, Protocol):
    """A source that can compute a part of a tensor without the rest."""

    def pieces(self, name: str) -> Iterator[Task[Array]]:
        """One tensor in row-major order; each call gives one piece, and they may be made in any order."""
        ...


def pieces_of(source: TensorSource, name: str) -> Iterator[Task[Array]]:
    """One tensor in pieces, read whole where its source knows no better.

    Args:
        source: of the tensor.
        name: the tensor's.

    Yields:
        What computes the next rows of it, in row-major order.
    """
    if isinstance(source, PieceSource):
        yield from source.pieces(name)
    else:
        yield from pieces_of_array(source.read(name))


def pieces_of_array(
    array: Array, make: Callable[[Array], Array] = contiguous, itemsize: int = 0
) -> Iterator[Task[Array]]:
    """An array's rows in pieces.

    Args:
        array: in any memory order.
        make: makes of some of its rows what is wanted, in row-major order.
        itemsize: bytes of an element of the widest type on the way; the array's own when smaller.
    """
    array = np.atleast_1d(array)
    for rows in row_blocks(array.shape, max(itemsize, array.itemsize)):
        yield partial(make, array[rows])  # a view: nothing is read yet


def in_order(tasks: Iterable[Task[T]]) -> Generator[T, None, None]:
    """The results of tasks, in their order, computed on all cores a few ahead of who takes them.

    Args:
        tasks: are taken one by one, as there is room; none of them may use this function itself.
    """
    waiting: deque[Future[T]] = deque()
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
