"""What a parity check found, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from peft_deploy.parity.case_result import CaseResult, OutputResult
from peft_deploy.parity.effect import Effect
from peft_deploy.parity.generation_result import GenerationResult
from peft_deploy.parity.tolerance import Limit

if TYPE_CHECKING:
    from rich.console import RenderableType

    from peft_deploy.parity.bisect import Finding
    from peft_deploy.parity.loss import Loss

FORMAT_VERSION = 1


@dataclass(frozen=True)
class CheckedLayers:
    """Which layers of a model were computed with, where it was not the whole model.

    Args:
        indices: of these layers.
        total: how many the model has.
    """

    indices: tuple[int, ...]
    total: int

    def __str__(self) -> str:
        listed = ", ".join(map(str, self.indices))
        return f"layers {listed} of {self.total}, put together to one model"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {"checked": list(self.indices), "total": self.total}


@dataclass(frozen=True)
class ParityReport:
    """The result of a parity check.

    Args:
        cases: one result for each.
        generation: of greedy text; None when it was not asked for.
        effect: of the adapter; None when the reference has none.
        limits: output → its limit.
        exact: whether the limits come from a float64 run of the reference.
        real_text: whether a tokenizer gave real text; random tokens stand in its place otherwise.
        seed: of the random tokens.
        warnings: what a reader has to know, one sentence each.
        seconds: stage → how long it took.
        provider: what ran the bundle.
        parts: the same graph with something else active (``"prefix poet"``) → the report of that.
        finding: where the bundle goes wrong, if that was looked for and found.
        loss: what a lower precision costs; None in fp32.
        layers: which of the model's layers were computed with; None for all of them.
    """

    cases: tuple[CaseResult, ...]
    generation: GenerationResult | None
    effect: Effect | None
    limits: Mapping[str, Limit]
    exact: bool
    real_text: bool
    seed: int
    warnings: Sequence[str] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    provider: str = ""
    parts: Mapping[str, ParityReport] = field(default_factory=dict)
    finding: Finding | None = None
    loss: Loss | None = None
    layers: CheckedLayers | None = None

    @property
    def passed(self) -> bool:
        """Whether every case, the generation and every part passed."""
        return self.passed_alone and all(part.passed for part in self.parts.values())

    @property
    def passed_alone(self) -> bool:
        """Whether every case and the generation passed, whatever became of the parts."""
        generated = self.generation is None or self.generation.passed
        return bool(self.cases) and generated and all(case.passed for case in self.cases)

    @property
    def failed(self) -> list[CaseResult]:
        """The cases that failed, first those that say themselves what is wrong, such as which weight."""
        failed = [case for case in self.cases if not case.passed]
        return sorted(failed, key=lambda case: case.problem is None)

    @property
    def worst(self) -> tuple[CaseResult, str, OutputResult] | None:
        """The case and the output that take up most of their limit."""
        found = [(case, *case.worst) for case in self.cases if case.worst is not None]
        return max(found, key=lambda item: item[2].used, default=None)

    def with_warnings(self, sentences: Sequence[str]) -> ParityReport:
        """The same report with more that a reader has to know."""
        return replace(self, warnings=[*self.warnings, *sentences]) if sentences else self

    def summary(self) -> str:
        """One sentence: whether it passed, over how much, and how near to its limit."""
        from peft_deploy.parity.table import closing_sentence

        return closing_sentence(self)

    def table(self) -> RenderableType:
        """All of it for people, to be printed by rich."""
        from peft_deploy.parity.table import render

        return render(self)

    def __str__(self) -> str:
        return self.summary()

    def to_dict(self, full: bool = False) -> dict[str, Any]:
        """A JSON-ready form: for the manifest, or with ``full`` every output of every case."""
        outputs = sum(len(case.outputs) for case in self.cases)
        data: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "passed": self.passed,
            "summary": self.summary(),
            "outputs_compared": outputs,
            "exact": self.exact,
            "real_text": self.real_text,
            "seed": self.seed,
            "provider": self.provider,
            "seconds": {stage: round(value, 3) for stage, value in self.seconds.items()},
            "warnings": list(self.warnings),
            "cases": [case.to_dict(full) for case in self.cases],
        }
        if self.generation is not None:
            data["generation"] = self.generation.to_dict()
        if self.finding is not None:
            data["finding"] = self.finding.to_dict()
        if self.loss is not None:
            data["loss"] = self.loss.to_dict()
        if self.layers is not None:
            data["layers"] = self.layers.to_dict()
        if self.parts:
            data["parts"] = {name: part.to_dict(full) for name, part in self.parts.items()}
        if self.effect is not None:
            data["adapter_effect"] = self.effect.to_dict()
        if full:
            data["limits"] = {name: limit.to_dict() for name, limit in self.limits.items()}
        return data
