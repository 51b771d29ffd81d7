"""Tensor names of Hugging Face checkpoints and of PaddleNLP, as data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class NameRule:
    """One pair of names; ``{i}`` stands for a layer's index.

    Args:
        paddle: PaddleNLP's parameter name.
        huggingface: the name in a Hugging Face checkpoint.
        transpose: torch's linear layers keep ``[out, in]``, Paddle's ``[in, out]``.
        paddle_only: Hugging Face's models have no such tensor (they keep the parts of a fused weight apart), and
            the name on that side is for graphs alone.
        conv1d: a linear layer that Hugging Face's models keep as ``[in, out]``, too, as GPT-2's ``Conv1D``.
    """

    paddle: str
    huggingface: str
    transpose: bool = False
    paddle_only: bool = False
    conv1d: bool = False


@dataclass(frozen=True)
class FusedRule:
    """PaddleNLP parameters that a Hugging Face checkpoint keeps as one tensor, equal blocks of its last axis.

    Such a tensor can be read; it is not written.

    Args:
        paddle: the parameters in the order of the blocks; ``{i}`` stands for a layer's index. Each of them has a
            rule of its own, too, with ``paddle_only``.
        huggingface: the one tensor.
    """

    paddle: tuple[str, ...]
    huggingface: str


@dataclass(frozen=True)
class MappedName:
    """A name on the other side, whether the matrix has to be transposed on the way, and what the
    :class:`NameRule` says of it.
    """

    name: str
    transpose: bool
    paddle_only: bool = False
    conv1d: bool = False

    @property
    def is_linear(self) -> bool:
        """Whether it is a matrix of a linear layer, so that torch's Linear and Conv1D tell it from an embedding."""
        return self.transpose or self.conv1d


class NameMap:
    """A bijection between the two naming schemes.

    Args:
        rules: the pairs.
        ignored: regular expressions of tensors that carry no weight (stored tables), whichever side they are on.
        fused: Hugging Face tensors that hold several parameters.
        rows: where all names are the same on both sides, what tells the layouts apart: a PaddleNLP parameter →
            its number of rows there, which is not its number of columns.
    """

    def __init__(
        self,
        rules: Iterable[NameRule],
        ignored: Iterable[str] = (),
        fused: Iterable[FusedRule] = (),
        rows: Mapping[str, int] | None = None,
    ) -> None:
        self.rules = tuple(rules)
        self.rows = dict(rows or {})
        self.fused = tuple(fused)
        self._fused = [(_pattern(rule.huggingface), rule.paddle) for rule in self.fused]
        self._ignored = [re.compile(pattern) for pattern in ignored]
        self._from_hf = [(_pattern(r.huggingface), r.paddle, r) for r in self.rules]
        self._from_paddle = [(_pattern(r.paddle), r.huggingface, r) for r in self.rules]

    def to_paddle(self, huggingface: str) -> MappedName | None:
        """PaddleNLP's name of a Hugging Face tensor; None for a name that is not in the map."""
        return _map(self._from_hf, huggingface)

    def to_huggingface(self, paddle: str) -> MappedName | None:
        """Hugging Face's name of a PaddleNLP parameter; None for a name that is not in the map."""
        return _map(self._from_paddle, paddle)

    def parts(self, huggingface: str) -> tuple[str, ...]:
        """PaddleNLP's names of the blocks of a fused tensor; none for a tensor that is not fused."""
        for pattern, names in self._fused:
            if match := pattern.fullmatch(huggingface):
                index = match.group(1) if match.groups() else ""
                return tuple(name.replace("{i}", index) for name in names)
        return ()

    def linear_layers(self) -> list[str]:
        """Templates of the linear layers in Hugging Face's models, fused ones as one; ``{i}`` is a layer's index."""
        rules = [r for r in self.rules if (r.transpose or r.conv1d) and not r.paddle_only]
        names = [*(r.huggingface for r in rules), *(r.huggingface for r in self.fused)]
        return [n.removesuffix(".weight") for n in names if n.endswith(".weight")]

    def parameters(self, num_layers: int) -> set[str]:
        """PaddleNLP's names of all parameters of a model with so many layers."""
        return {name for rule in self.rules for name in self.indexed(rule.paddle, num_layers)}

    def indexed(self, template: str, num_layers: int) -> list[str]:
        """A name of either side for each layer of a model with so many; the name alone where it has no index."""
        if "{i}" not in template:
            return [template]
        return [template.replace("{i}", str(i)) for i in range(num_layers)]

    def with_layers(self, layers: Sequence[int]) -> dict[str, str]:
        """PaddleNLP's names of the parameters of a model that has only some layers of another one.

        Args:
            layers: the other model's indices of these layers, in order.

        Returns:
            Parameter → the other model's parameter that it is.
        """
        found: dict[str, str] = {}
        for rule in self.rules:
            if "{i}" not in rule.paddle:
                found[rule.paddle] = rule.paddle
                continue
            for new, old in enumerate(layers):
                name = rule.paddle.replace("{i}", str(new))
                found[name] = rule.paddle.replace("{i}", str(old))
        return found

    def module_to_huggingface(self, paddle: str) -> str:
        """Hugging Face's path of a module, for names of nodes; the same path when no parameter lies under it."""
        parts = paddle.split(".")
        for rule in self.rules:
            templates = rule.paddle.split("."), rule.huggingface.split(".")
            index = _index_under(templates[0], parts)
            if index is not None and len(templates[0]) == len(templates[1]):
                return ".".join(templates[1][: len(parts)]).replace("{i}", index)
        return paddle

    def ignores(self, huggingface: str) -> bool:
        """Whether the tensor carries no weight and may be left out."""
        return any(pattern.fullmatch(huggingface) for pattern in self._ignored)


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(re.escape("{i}"), r"(\d+)"))


def _map(table: list[tuple[re.Pattern[str], str, NameRule]], name: str) -> MappedName | None:
    for pattern, template, rule in table:
        if match := pattern.fullmatch(name):
            index = match.group(1) if match.groups() else ""
            name = template.replace("{i}", index)
            return MappedName(name, rule.transpose, rule.paddle_only, rule.conv1d)
    return None


def _index_under(template: list[str], parts: list[str]) -> str | None:
    """The layer index when ``parts`` is a prefix of the template ("" when it has none), else None."""
    if len(parts) >= len(template):
        return None
    index = ""
    for wanted, part in zip(template, parts, strict=False):
        if wanted == "{i}" and part.isdigit():
            index = part
        elif wanted != part:
            return None
    return index
