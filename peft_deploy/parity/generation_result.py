"""How greedy generation went, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft_deploy.parity.compare import json_number

if TYPE_CHECKING:
    pass


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
