"""How large an error may be: derived from the reference's own, never guessed.

The rule, for every output by itself, with errors in units of the largest magnitude that the case
expects:

    limit = max(floor, K x the reference's own error)

*The reference's own error* is what float32 does to the dynamic-graph model on the very same cases:
it is run through all of them, and compared with itself in float64 ("exact"). A correct export
computes the same sums in another order, so its distance from the exact result is of the same size.
Any fault that matters is larger than that: noise is 1e-5 of the scale in a trained model, one per
cent of an adapter is usually 1e-3 or more.

Two statistics are held to the rule. The largest error catches what is wrong in one place; the
mean, which hardly varies between two correct implementations, catches what is slightly wrong
everywhere.

*K* covers what differs between correct implementations: kernels that block their sums differently,
weights that were rounded once more by a merge, fused operators. The largest ratio seen between a
correct bundle's error and the reference's own was 2.8, over 150 random decoders and a trained one
under ONNX Runtime; K leaves as much room again.

*The floor* covers outputs on which the reference happens to make almost no error, such as the
first layer's cache: a few roundings of the element type.

Where a float64 copy of the model would be too large, the exact result is replaced by the reference
in float32 on plain texts, and its own error by how far its other arrangements of the same tokens
(padded, in chunks, with a cache) are from that. Kernels repeat the same sums in many arrangements,
so this underestimates the noise, and the floor is higher: 1e-4 of the scale.

A reference that is far from itself on some case is at fault there (its family treats padding or
the cache in its own way). Such a case is named in the report and has no part in the limits.

For 16 bits the same rule holds, with the reference's own error measured as those 16 bits would have
it: what every module takes and gives is rounded, and so are the cache and the logits. Weights are no matter
here, because the reference computes with the very numbers that the bundle holds. Operators inside
of a module round as well, and a module has about eight of them, whose errors add up like sqrt(8);
:data:`K_16` is above that. There is no float64 floor to speak of: the noise never is below the
rounding of the output itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from peft_deploy.parity.compare import Difference

# Unit roundoff of an element type: half the distance between 1 and the next number.
ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}

K = 8.0
K_16 = 4.0  # for 16 bits
FLOOR_ROUNDINGS = 16  # of the largest error, in units of the roundoff
MEAN_FLOOR_ROUNDINGS = 2  # of the mean error
FLOOR_WITHOUT_EXACT = 1e-4
MEAN_FLOOR_WITHOUT_EXACT = 1e-5
MEAN_OF_ROUNDING = 16  # values are mostly far below the largest, and so is what rounding takes
SANE_ROUNDINGS = 2**14  # beyond this (1e-3 in float32) the reference is not noisy but inconsistent


@dataclass(frozen=True)
class Limit:
    """How large an output's relative errors may be.

    Args:
        maximum: of the largest error.
        mean: of the mean error.
        noise_maximum: the reference's own largest error that ``maximum`` comes from.
        noise_mean: likewise for ``mean``.
    """

    maximum: float
    mean: float
    noise_maximum: float = 0.0
    noise_mean: float = 0.0

    def used(self, difference: Difference) -> float:
        """The share of the limit that an error takes up; above 1 it is broken."""
        used = max(difference.relative_max / self.maximum, difference.relative_mean / self.mean)
        return used if difference.unequal_specials == 0 else float("inf")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def derive_limit(noise: Iterable[Difference], *, exact: bool, dtype: str = "float32") -> Limit:
    """The limit of one output.

    Args:
        noise: the reference's own differences on the sane cases.
        exact: whether they were measured against float64.
        dtype: of the exported model.
    """
    if dtype != "float32":
        return _derive_16(list(noise), ROUNDOFF[dtype])
    roundoff = ROUNDOFF[dtype]
    measured = list(noise)
    largest = max((d.relative_max for d in measured), default=0.0)
    mean = max((d.relative_mean for d in measured), default=0.0)
    rounding = roundoff / ROUNDOFF["float32"]
    floor = FLOOR_ROUNDINGS * roundoff if exact else FLOOR_WITHOUT_EXACT * rounding
    mean_floor = MEAN_FLOOR_ROUNDINGS * roundoff if exact else MEAN_FLOOR_WITHOUT_EXACT * rounding
    return Limit(max(floor, K * largest), max(mean_floor, K * mean), largest, mean)


def _derive_16(noise: Sequence[Difference], roundoff: float) -> Limit:
    """The floors are the rounding of the output itself: at most, and on average."""
    largest = max((d.relative_max for d in noise), default=0.0)
    mean = max((d.relative_mean for d in noise), default=0.0)
    floor, mean_floor = K_16 * roundoff, K_16 * roundoff / MEAN_OF_ROUNDING
    return Limit(max(floor, K_16 * largest), max(mean_floor, K_16 * mean), largest, mean)


def is_sane(difference: Difference, dtype: str = "float32") -> bool:
    """Whether the reference agrees with itself as far as its precision lets it."""
    ceiling = SANE_ROUNDINGS * ROUNDOFF[dtype]
    return difference.unequal_specials == 0 and difference.relative_max <= ceiling
