"""How much of a trained change is lost when the changed weight is rounded to a narrow type.

A weight of size 1 has neighbours 0.0078 apart in bfloat16 and 0.00098 in float16, while what LoRA
adds to it is often not larger than that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from peft_deploy.errors import listed
from peft_deploy.weights.grid import elements_per_axis
from peft_deploy.weights.source import Array

# So many elements of a tensor are looked at, on a grid spread evenly: rows differ from each other, and columns do.
# A share is then known to a few per cent, and costs nothing beside reading the tensor.
SAMPLED = 1 << 16
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


def sampled(shape: tuple[int, ...]) -> tuple[slice, ...]:
    """A grid spread evenly over a tensor of at least one dimension, with at most :data:`SAMPLED` elements."""
    shape = shape or (1,)
    counts = elements_per_axis(shape, SAMPLED)
    steps = (-(-length // max(1, n)) for length, n in zip(shape, counts, strict=True))
    return tuple(slice(None, None, max(1, step)) for step in steps)


def lossy(shares: Mapping[str, float]) -> dict[str, float]:
    """The shares above :data:`ROUNDING_LIMIT`, the largest first.

    Args:
        shares: parameter → what rounding lost of its change.
    """
    over = {name: share for name, share in shares.items() if share > ROUNDING_LIMIT}
    return dict(sorted(over.items(), key=lambda item: -item[1]))


def describe_losses(dtype: str, shares: Mapping[str, float]) -> str | None:
    """What to warn of; None when rounding lost little everywhere.

    Args:
        dtype: that was rounded to.
        shares: parameter → what rounding lost of its change.
    """
    over = lossy(shares)
    if not over:
        return None
    lines = [f"{name}: {share:.2f}" for name, share in over.items()]
    remedy = (
        "float16 keeps eight times more than bfloat16, float32 all of it"
        if dtype in NARROW
        else "the adapter hardly changes these layers: was its training rate far too small?"
    )
    return (
        f"rounding to {dtype} lost more than {ROUNDING_LIMIT} of what the adapter changes "
        f"(‖error‖ / ‖change‖) in {len(lines)} tensors:\n{listed(lines)}\n{remedy}"
    )


def _squares(array: npt.NDArray[Any]) -> float:
    return float(np.square(array, out=array).sum())
