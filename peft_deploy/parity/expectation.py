"""What a bundle has to give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from peft_deploy.parity.cases import CaseMatrix, Text
from peft_deploy.parity.effect import Effect
from peft_deploy.parity.play import Results
from peft_deploy.parity.tolerance import Limit


@dataclass(frozen=True, eq=False)
class Expectation:
    """What the reference says about every text, and how far a bundle may be from that.

    Made by :func:`~peft_deploy.parity.measurement.measure_reference`, or read from a bundle that it was
    recorded in.

    Args:
        matrix: the texts, and the cases that are arrangements of them.
        known: what every text has to give.
        limits: output → how large its errors may be.
        effect: of the adapter; None when the reference has none.
        exact: whether ``known`` was computed in float64.
        warnings: what a reader of the report has to know, one sentence each.
        seconds: stage → how long it took.
    """

    matrix: CaseMatrix
    known: Mapping[Text, Results]
    limits: Mapping[str, Limit]
    effect: Effect | None
    exact: bool
    warnings: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
