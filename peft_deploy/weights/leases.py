"""Memory for tensors of large checkpoints, used again for one after the other.

A tensor in a mapped file comes into memory page by page, into pages that the operating system has to find first. On a
virtual machine the host has to find them, too: reading 13.5 GB so took 20 s of computing time more than computing with
them (two cores). Read past the page cache into the same memory again and again, it takes 1 s.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from threading import Lock
from typing import TypeVar

import numpy as np

from peft_deploy.weights._mapped import mapped_span
from peft_deploy.weights.large_file import page_aligned, read_past_cache, room_for
from peft_deploy.weights.pieces import Task
from peft_deploy.weights.source import Array

T = TypeVar("T")

_LARGEST = 256 << 20  # bytes of a tensor; larger ones stay mapped
_KEPT = 4  # pieces of memory that wait for another tensor


class Leases:
    """Lends memory to tensors. Safe to use in several threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._free: list[Array] = []

    def load(self, array: Array) -> Lease | None:
        """A tensor read into such memory.

        Args:
            array: a view of a mapped file.

        Returns:
            None where it is not, is too large, or cannot be read so: then the mapped one has to do.
        """
        span = mapped_span(array)
        if span is None or room_for(span) > _LARGEST:
            return None
        try:
            memory = self._take(room_for(span))
        except OSError:  # no memory for it
            return None
        begin = read_past_cache(span, memory)
        if begin is None:
            self._give_back(memory)
            return None
        loaded: Array = np.ndarray(array.shape, array.dtype, memory.data, begin, array.strides)
        return Lease(loaded, partial(self._give_back, memory))

    def _take(self, nbytes: int) -> Array:
        with self._lock:
            for i, memory in enumerate(self._free):  # the smallest first
                if memory.size >= nbytes:
                    return self._free.pop(i)
        return page_aligned(nbytes)

    def _give_back(self, memory: Array) -> None:
        with self._lock:
            self._free = sorted([*self._free, memory], key=len)[-_KEPT:]


class Lease:
    """A tensor in memory that another one gets once all that is computed of it is there.

    Args:
        array: the tensor.
        give_back: takes the memory back.
    """

    def __init__(self, array: Array, give_back: Task[None]) -> None:
        self.array = array
        self._give_back = give_back
        self._lock = Lock()
        self._holders = 0

    def over(self, tasks: Iterator[Task[T]]) -> Iterator[Task[T]]:
        """The tasks; when all have been taken and have run, once each, the memory is given back.

        Args:
            tasks: compute of the tensor what shares no memory with it. Where one is never run, its memory is not used
                again.
        """
        self._hold()
        for task in tasks:
            self._hold()
            yield partial(self._run, task)
        self._release()

    def _run(self, task: Task[T]) -> T:
        if not self._holders:
            raise RuntimeError("a piece of a tensor was asked for a second time")
        result = task()
        self._release()
        return result

    def _hold(self) -> None:
        with self._lock:
            self._holders += 1

    def _release(self) -> None:
        with self._lock:
            self._holders -= 1
            last = not self._holders
        if last:
            self._give_back()
