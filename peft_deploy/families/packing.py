"""Which linear layers read the same input and can be one matrix, as data."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

WEIGHT, BIAS = ".weight", ".bias"


@dataclass(frozen=True)
class PackRule:
    """Linear layers of one input.

    Args:
        parent: PaddleNLP's path of the module that holds them; ``{i}`` stands for a layer's index.
        parts: their names in it, in the order in which their columns stand in the packed matrix.
        packed: the packed layer's name in it.
    """

    parent: str
    parts: tuple[str, ...]
    packed: str


@dataclass(frozen=True)
class PackedLinear:
    """Linear layers of a model that are stored and computed as one.

    Args:
        module: path of the packed layer, as PaddleNLP would call it.
        parts: paths of the layers in it, in the order of their columns.
        biased: whether all of them have a bias; otherwise none has.
    """

    module: str
    parts: tuple[str, ...]
    biased: bool

    @property
    def tensors(self) -> dict[str, tuple[str, ...]]:
        """Packed parameter → the parameters that it is made of."""
        kinds = (WEIGHT, BIAS) if self.biased else (WEIGHT,)
        return {self.module + kind: tuple(part + kind for part in self.parts) for kind in kinds}


def find_packed(rules: Iterable[PackRule], names: Collection[str]) -> list[PackedLinear]:
    """The layers that rules pack, of a model with these parameters.

    A group is packed when all of its layers are there, and all of them or none have a bias.

    Args:
        rules: the family's.
        names: PaddleNLP's names of the parameters.
    """
    known = frozenset(names)
    return [
        found
        for rule in rules
        for parent in _parents(rule, known)
        if (found := _pack(rule, parent, known))
    ]


def _parents(rule: PackRule, names: Collection[str]) -> Iterator[str]:
    """The modules that a rule speaks of, by layer."""
    first = f"{rule.parent}.{rule.parts[0]}{WEIGHT}"
    pattern = re.compile(re.escape(first).replace(re.escape("{i}"), r"(\d+)"))
    matches = filter(None, map(pattern.fullmatch, names))
    for index in sorted({match[1] if match.groups() else "" for match in matches}, key=_number):
        yield rule.parent.replace("{i}", index)


def _number(index: str) -> int:
    return int(index or 0)


def _pack(rule: PackRule, parent: str, names: Collection[str]) -> PackedLinear | None:
    parts = tuple(f"{parent}.{part}" for part in rule.parts)
    biases = sum(part + BIAS in names for part in parts)
    if any(part + WEIGHT not in names for part in parts) or biases not in (0, len(parts)):
        return None
    return PackedLinear(f"{parent}.{rule.packed}", parts, biased=biases > 0)
