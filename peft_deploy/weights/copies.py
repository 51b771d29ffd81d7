"""Tensors that a checkpoint has to hold twice, because who reads it keeps two parameters where one would do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from peft_deploy.weights.source import Array, TensorInfo, TensorSource


class WithCopies:
    """A source with some of its tensors under a second name, too.

    Args:
        source: the tensors.
        copies: second name → the tensor's own; names that the source has already are left out.
    """

    def __init__(self, source: TensorSource, copies: Mapping[str, str]) -> None:
        self._source = source
        own = set(source.names())
        self._copies = {name: target for name, target in copies.items() if name not in own}

    def names(self) -> Sequence[str]:
        """The source's names, then those of the copies."""
        return [*self._source.names(), *self._copies]

    def info(self, name: str) -> TensorInfo:
        """Type and shape of one tensor; KeyError if unknown."""
        return replace(self._source.info(self._copies.get(name, name)), name=name)

    def read(self, name: str) -> Array:
        """One tensor."""
        return self._source.read(self._copies.get(name, name))
