"""What an adapter changes, against what a check can see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft_deploy.parity.compare import Difference, json_number
from peft_deploy.parity.tolerance import Limit
from peft_deploy.signature import LOGITS

if TYPE_CHECKING:
    pass


# The check must be able to see an adapter that is wrong by a tenth; otherwise it says so.
BLIND_ABOVE = 0.1


@dataclass(frozen=True)
class Effect:
    """What the adapter changes, against what the check can see.

    Args:
        differences: output → its difference with and without the adapter, on one text.
        limits: output → its limit.
    """

    differences: Mapping[str, Difference]
    limits: Mapping[str, Limit]

    @property
    def output(self) -> str:
        """The output that stands for all: the logits, or the first one of a model without."""
        return LOGITS if LOGITS in self.differences else next(iter(self.differences))

    @property
    def main(self) -> Difference:
        """Of that output."""
        return self.differences[self.output]

    @property
    def subject(self) -> str:
        """That output in a sentence."""
        return "the logits" if self.output == LOGITS else self.output

    @property
    def sensitivity(self) -> float:
        """The smallest relative error of the adapter's strength that breaks some limit.

        0.01 means that an adapter applied 1 % too strongly fails the check.
        """
        used = max(self.limits[name].used(d) for name, d in self.differences.items())
        return 1 / used if used > 0 else float("inf")

    @property
    def is_blind(self) -> bool:
        """Whether an adapter that is wrong by a tenth, or missing, could pass."""
        return self.sensitivity > BLIND_ABOVE

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {
            "output": self.output,
            "max_abs": self.main.max_abs,
            "mean_abs": self.main.mean_abs,
            "relative_max": json_number(self.main.relative_max),
            "sensitivity": json_number(self.sensitivity),
            "proves_nothing": self.is_blind,
        }
