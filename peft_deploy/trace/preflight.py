"""Which operators of a program the converter will fail on, known before it runs.

Paddle2ONNX aborts the process for the first unsupported operator and converts some others wrongly without a word
(:mod:`peft_deploy.trace.quirks`), so a program is checked operator by operator first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from peft_deploy.errors import UnsupportedOperatorError, nearest
from peft_deploy.trace.quirks import (
    FLOAT64_ATTRIBUTES_SAFE,
    RENAMED,
    REPLACEMENTS,
    STRUCTURAL,
    WRONG,
    WRONG_ATTRIBUTES,
)

MAX_SHOWN = 5  # findings spelled out in one message
_JUDGED_ATTRIBUTES = frozenset(attribute for attribute, _, _ in WRONG_ATTRIBUTES.values())


@dataclass(frozen=True)
class OperatorUse:
    """One operator of a program.

    Args:
        name: with its dialect: ``pd_op.matmul``.
        module: path of the layer that made it (``struct_name`` of the program), ``""`` when unknown.
        locate: gives ``file:line`` of the user's code, ``""`` when unknown; asked only for what is reported.
        attributes: its attributes.
        float64_attributes: names of those that are stored in double precision.
    """

    name: str
    module: str = ""
    locate: Callable[[], str] = str
    attributes: Mapping[str, Any] = field(default_factory=dict)
    float64_attributes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form, its source line looked up."""
        return {
            "name": self.name,
            "module": self.module,
            "location": self.locate(),
            "attributes": {k: v for k, v in self.attributes.items() if k in _JUDGED_ATTRIBUTES},
            "float64_attributes": list(self.float64_attributes),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> OperatorUse:
        """The inverse of :meth:`to_dict`."""
        return cls(
            name=data["name"],
            module=data["module"],
            locate=lambda: str(data["location"]),
            attributes=data["attributes"],
            float64_attributes=tuple(data["float64_attributes"]),
        )


@dataclass(frozen=True)
class Finding:
    """An operator that cannot be converted, or not correctly."""

    operator: OperatorUse
    reason: str

    def __str__(self) -> str:
        where = self.operator.module or "the model's own forward"
        source = self.operator.locate()
        source = f" ({source})" if source else ""
        return f"{self.operator.name} in {where}{source}: {self.reason}"


def find_problems(operators: Iterable[OperatorUse], supported: Collection[str]) -> list[Finding]:
    """All operators that the converter cannot handle.

    Args:
        operators: the program, sub-blocks included.
        supported: the converter's registry (``get_all_supported_operators_pir()``).
    """
    findings = []
    for use in operators:
        reason = _problem(use, supported)
        if reason:
            findings.append(Finding(use, reason))
    return findings


def check_program(operators: Iterable[OperatorUse], supported: Collection[str]) -> None:
    """Fails when the converter cannot handle some operator.

    Raises:
        UnsupportedOperatorError: naming operator, module path and source line of each.
    """
    findings = find_problems(operators, supported)
    if not findings:
        return
    lines = [f"  {finding}" for finding in findings[:MAX_SHOWN]]
    if len(findings) > MAX_SHOWN:
        lines.append(f"  … and {len(findings) - MAX_SHOWN} more")
    raise UnsupportedOperatorError(
        "the model uses operators that Paddle2ONNX cannot convert:\n" + "\n".join(lines),
        hint="replace them in the model's forward before exporting",
    )


def _problem(use: OperatorUse, supported: Collection[str]) -> str | None:
    if use.name in STRUCTURAL:
        return None
    dialect, _, name = use.name.partition(".")
    if dialect == "builtin":
        name = f"builtin_{name}"
    known = {name, RENAMED.get(name, name)}
    if name in REPLACEMENTS and not known & set(supported):
        return f"it has no translation; {REPLACEMENTS[name]}"
    if name in WRONG:
        return f"it {WRONG[name]}"
    if name in WRONG_ATTRIBUTES:
        attribute, value, why = WRONG_ATTRIBUTES[name]
        if use.attributes.get(attribute) == value:
            return why
    if not known & set(supported):
        close = nearest(name, supported, limit=1)
        return "it has no translation" + (f"; the closest that has is {close[0]}" if close else "")
    if use.float64_attributes and name not in FLOAT64_ATTRIBUTES_SAFE:
        attributes = ", ".join(use.float64_attributes)
        return f"its double-precision attribute {attributes} would be read as another number"
    return None
