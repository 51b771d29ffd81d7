"""What a parity check found, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peft_deploy.parity.compare import Difference, json_number
from peft_deploy.parity.tolerance import Limit
from peft_deploy.signature import LOGITS

if TYPE_CHECKING:
    from rich.console import RenderableType

    from peft_deploy.parity.bisect import Finding

FORMAT_VERSION = 1

# The check must be able to see an adapter that is wrong by a tenth; otherwise it says so.
BLIND_ABOVE = 0.1


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


@dataclass(frozen=True)
class Divergence:
    """A place where the reference would have continued the bundle's text with another token.

    Args:
        step: index of the generated token.
        expected: the reference's token.
        actual: the bundle's token.
        gap: by how much the reference prefers its own token to the bundle's, in logits.
        margin: the reference's distance from its best to its second-best token, in logits.
        noise: the largest gap that two correct computations can disagree about, in logits.
    """

    step: int
    expected: int
    actual: int
    gap: float
    margin: float
    noise: float

    @property
    def is_tie(self) -> bool:
        """Whether the reference itself could have chosen the other token."""
        return self.gap <= self.noise

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: json_number(v) for name, v in plain.items()} | {"tie": self.is_tie}


@dataclass(frozen=True)
class PromptResult:
    """Greedy generation from one prompt.

    Args:
        prompt: the text, or what stands in its place.
        expected: what the reference would have written at each step, after the bundle's tokens
            before it.
        actual: the bundle's tokens.
        divergence: the first difference that is no tie, or else the first tie; None when all
            tokens are equal.
        compared: how many of the tokens could be compared; all of them when None.
    """

    prompt: str
    expected: tuple[int, ...]
    actual: tuple[int, ...]
    divergence: Divergence | None = None
    compared: int | None = None

    @property
    def agreeing(self) -> int:
        """How many of the compared tokens are equal."""
        pairs = list(zip(self.expected, self.actual, strict=True))[: self.compared]
        return sum(expected == actual for expected, actual in pairs)

    @property
    def passed(self) -> bool:
        """Whether the tokens are equal but for ties."""
        return self.divergence is None or self.divergence.is_tie

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        data: dict[str, Any] = {
            "prompt": self.prompt,
            "passed": self.passed,
            "expected": list(self.expected),
            "actual": list(self.actual),
            "compared": len(self.actual) if self.compared is None else self.compared,
        }
        if self.divergence is not None:
            data["divergence"] = self.divergence.to_dict()
        return data


@dataclass(frozen=True)
class GenerationResult:
    """Greedy generation from all prompts, in one padded batch.

    Args:
        prompts: one result each.
        problem: why the bundle did not generate.
        seconds: how long the bundle took.
    """

    prompts: tuple[PromptResult, ...]
    problem: str | None = None
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether every prompt passed."""
        return self.problem is None and all(p.passed for p in self.prompts)

    @property
    def ties(self) -> int:
        """Prompts in whose text the worst difference is a tie."""
        return sum(p.divergence is not None and p.divergence.is_tie for p in self.prompts)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        data: dict[str, Any] = {
            "passed": self.passed,
            "ties": self.ties,
            "seconds": round(self.seconds, 3),
            "prompts": [p.to_dict() for p in self.prompts],
        }
        return data if self.problem is None else data | {"problem": self.problem}


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
    def worst(self) -> tuple[CaseResult, str, OutputResult] | None:
        """The case and the output that take up most of their limit."""
        found = [(case, *case.worst) for case in self.cases if case.worst is not None]
        return max(found, key=lambda item: item[2].used, default=None)

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
        if self.parts:
            data["parts"] = {name: part.to_dict(full) for name, part in self.parts.items()}
        if self.effect is not None:
            data["adapter_effect"] = self.effect.to_dict()
        if full:
            data["limits"] = {name: limit.to_dict() for name, limit in self.limits.items()}
        return data
