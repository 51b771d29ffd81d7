"""Memory for what lies between two steps of a computation.

The operating system gives a process fresh memory page by page, each filled with zeros first. For passes over a few
hundred kilobytes that takes longer than the passes, so every thread keeps what it has once been given.
"""

from __future__ import annotations

import math
import threading

import numpy as np

from peft_deploy.weights.source import Array


class Scratch(threading.local):
    """One piece of memory in each thread, as large as the largest that was asked for; gone when the thread ends."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def array(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Array:
        """An array of this memory, with anything in it; valid until the next call in the same thread."""
        size = math.prod(shape) * dtype.itemsize
        if self._memory.size < size:
            self._memory = np.empty(size, np.uint8)
        return self._memory[:size].view(dtype).reshape(shape)
