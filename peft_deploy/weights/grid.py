"""Evenly spaced samples of tensors."""

from __future__ import annotations

import math


def elements_per_axis(shape: tuple[int, ...], most: int) -> list[int]:
    """How many positions of each axis to look at; what a short axis does not use is left for the longer ones.

    Args:
        shape: of the tensor.
        most: the product of all counts, at most.
    """
    counts = [0] * len(shape)
    left = most
    for done, axis in enumerate(sorted(range(len(shape)), key=lambda a: shape[a])):
        share = math.floor(left ** (1 / (len(shape) - done)) + 1e-9)
        counts[axis] = min(shape[axis], max(1, share))
        left //= max(1, counts[axis])
    return counts
