"""How one case of a check went, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peft_deploy.parity.compare import Difference, json_number
from peft_deploy.parity.tolerance import Limit

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class OutputResult:
    """One output of one case."""

    difference: Difference
    limit: Limit

    @property
    def used(self) -> float:
        """The share of the limit that the error takes up; above 1 it is broken."""
        return self.limit.used(self.difference)

    @property
    def passed(self) -> bool:
        """Whether the error is within its limit."""
        return self.used <= 1


@dataclass(frozen=True)
class CaseResult:
    """One case.

    Args:
        name: of the case.
        group: the line of the table that it counts in.
        shape: batch, past and calls, in words.
        outputs: by name; empty when the graph did not run.
        problem: why it did not run.
        seconds: how long the bundle took.
    """

    name: str
    group: str
    shape: str
    outputs: Mapping[str, OutputResult] = field(default_factory=dict)
    problem: str | None = None
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether it ran and every output is within its limit."""
        return self.problem is None and all(o.passed for o in self.outputs.values())

    @property
    def worst(self) -> tuple[str, OutputResult] | None:
        """Name and result of the output that takes up most of its limit; None when there are
        none.
        """
        if not self.outputs:
            return None
        return max(self.outputs.items(), key=lambda item: item[1].used)

    def to_dict(self, full: bool = False) -> dict[str, Any]:
        """A JSON-ready form: the worst output, or with ``full`` all of them."""
        data: dict[str, Any] = {
            "name": self.name,
            "group": self.group,
            "shape": self.shape,
            "passed": self.passed,
            "outputs_compared": len(self.outputs),
            "outputs_failed": sum(not o.passed for o in self.outputs.values()),
            "seconds": round(self.seconds, 3),
        }
        if self.problem is not None:
            data["problem"] = self.problem
        if self.worst is not None:
            name, result = self.worst
            data["worst"] = {"output": name, **_output_dict(result)}
            del data["worst"]["histogram"]
        if full:
            data["outputs"] = {name: _output_dict(o) for name, o in self.outputs.items()}
        return data


def _output_dict(result: OutputResult) -> dict[str, Any]:
    return {
        **result.difference.to_dict(),
        "limit_max": result.limit.maximum,
        "limit_mean": result.limit.mean,
        "limit_used": json_number(result.used),
    }
