"""What fusing a graph came to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

UNKNOWN_FORM = "not in a form that the rule knows"


@dataclass
class FusionReport:
    """How often each fusion found its pattern, and what stayed plain.

    Args:
        fused: fusion → how often; every fusion that was tried is there.
        plain: fusion → reason → the modules (folders of their nodes) in which nodes stayed that it is made for.
        refused: why the whole graph was left as it was; None when it was not.
    """

    fused: dict[str, int] = field(default_factory=dict)
    plain: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    refused: str | None = None

    def leave(self, fusion: str, reason: str, module: str) -> None:
        """Notes that nodes of a module stayed plain."""
        modules = self.plain.setdefault(fusion, {}).setdefault(reason, [])
        if module not in modules:
            modules.append(module)

    def to_dict(self) -> dict[str, Any]:
        """What the manifest's ``graph`` gets: ``fused``, and where there is any, ``plain`` and ``not_fused``."""
        facts: dict[str, Any] = {"fused": dict(self.fused)}
        if self.plain:
            facts["plain"] = self.plain
        if self.refused is not None:
            facts["not_fused"] = self.refused
        return facts
