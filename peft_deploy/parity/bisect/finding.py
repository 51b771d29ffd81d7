"""What a search found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from peft_deploy.parity.bisect.taps import GRAPH
from peft_deploy.parity.compare import Difference, json_number
from peft_deploy.parity.tolerance import Limit

_SHOWN = 4


@dataclass(frozen=True)
class Weight:
    """A weight of a suspected operator that is not the one it was made of.

    Args:
        name: in the graph.
        note: what is wrong with it.
    """

    name: str
    note: str


@dataclass(frozen=True)
class Finding:
    """The first value of a graph that is not the reference's.

    Args:
        case: in which it was found, and the call.
        layer: path of the first bad layer, as PaddleNLP has it; None outside of all layers.
        module: path of the first bad module.
        what: ``"output"`` or ``"input"`` of the module, or ``"graph output"``: of that name.
        value: the value's name in the graph.
        difference: between the two.
        limit: that it breaks.
        nodes: operators of the graph that may be at fault: all that lie between good values and this one, but for
            those of ``shared``.
        weights: of those operators that are not what they should be.
        inputs: good values that the operators start from.
        expected: the reference's value.
        counts: which of its elements belong to real tokens.
        shared: operators before those whose results other layers, which are good, are made of, too.
    """

    case: str
    layer: str | None
    module: str
    what: str
    value: str
    difference: Difference
    limit: Limit
    nodes: Sequence[str]
    weights: Sequence[Weight] = ()
    inputs: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict, repr=False)
    expected: npt.NDArray[Any] = field(default_factory=lambda: np.zeros(0), repr=False)
    counts: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool), repr=False)
    shared: Sequence[str] = ()

    @property
    def place(self) -> str:
        """What is wrong first, in words."""
        name = "" if self.what == GRAPH else "of "
        return f"the {self.what} {name}{self.module}"

    def __str__(self) -> str:
        """What was found, some lines for a terminal."""
        d, where = self.difference, f" (layer {self.layer})" if self.layer else ""
        lines = [
            f"In “{self.case}”, everything is right up to {self.place}{where}.",
            f"  {self.value}{list(d.index)} is {d.actual:.6g}, PaddleNLP has {d.expected:.6g}; the largest "
            f"error is {d.relative_max:.2g} of the scale, {self.limit.maximum:.2g} is allowed.",
        ]
        shown = ", ".join(self.nodes[:_SHOWN]) + (" …" if len(self.nodes) > _SHOWN else "")
        lines.append(f"  Between good values and this one: {len(self.nodes)} operator(s): {shown}")
        if self.shared:
            count = len(self.shared)
            lines.append(f"  Before those: {count} operator(s) whose results good layers use, too")
        lines += [f"  {weight.name}: {weight.note}" for weight in self.weights]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form, without the arrays."""
        return {
            "case": self.case,
            "layer": self.layer,
            "module": self.module,
            "what": self.what,
            "value": self.value,
            "index": list(self.difference.index),
            "expected": json_number(self.difference.expected),
            "actual": json_number(self.difference.actual),
            "relative_max": json_number(self.difference.relative_max),
            "limit": self.limit.maximum,
            "nodes": list(self.nodes),
            "shared": list(self.shared),
            "weights": [{"name": w.name, "note": w.note} for w in self.weights],
        }
