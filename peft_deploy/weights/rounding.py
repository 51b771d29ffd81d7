"""How much of a trained change is lost when the changed weight is rounded to a narrow type.

A weight of size 1 has neighbours 0.0078 apart in bfloat16 and 0.00098 in float16, while what LoRA
adds to it is often not larger than that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from peft_deploy.weights.blocks import row_blocks
from peft_deploy.weights.source import Array

NARROW = frozenset({"float16", "bfloat16"})
# At 0.25 the change that remains still points where the trained one did (cosine about 0.97); above
# it, rounding is no longer small beside what was trained.
ROUNDING_LIMIT = 0.25


@dataclass
class RoundingLoss:
    """Sums over one tensor's elements.

    Args:
        lost: of (round(W + Δ) - (W + Δ))².
        changed: of Δ².
    """

    lost: float = 0.0
    changed: float = 0.0

    @property
    def relative(self) -> float:
        """‖round(W + Δ) - (W + Δ)‖ / ‖Δ‖; 0 when nothing was changed."""
        return math.sqrt(self.lost / self.changed) if self.changed else 0.0

    def add(self, before: Array, exact: Array, rounded: Array) -> None:
        """Counts a piece of the tensor.

        Args:
            before: W.
            exact: W + Δ in a wider type than ``rounded``.
            rounded: round(W + Δ).
        """
        wide: npt.NDArray[Any] = exact.astype(np.float64)
        self.changed += _squares(wide - before.astype(np.float64))
        self.lost += _squares(rounded.astype(np.float64) - wide)

    def add_all(self, before: Array, exact: Array, rounded: Array) -> None:
        """Counts a whole tensor in pieces; arguments as for :meth:`add`."""
        arrays = [np.atleast_1d(array) for array in (before, exact, rounded)]
        for rows in row_blocks(arrays[0].shape, np.dtype(np.float64).itemsize):
            self.add(*(array[rows] for array in arrays))


def _squares(array: npt.NDArray[Any]) -> float:
    return float(np.square(array, out=array).sum())
