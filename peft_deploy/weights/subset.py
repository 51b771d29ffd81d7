"""A source of tensors without some of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from peft_deploy.weights.pieces import Task, pieces_of
from peft_deploy.weights.source import Array, TensorInfo, TensorSource


class SubsetTensors:
    """A :class:`~peft_deploy.weights.source.TensorSource` that leaves tensors out.

    Args:
        source: all of them.
        without: the names to leave out; those that the source does not have are of no consequence.
    """

    def __init__(self, source: TensorSource, without: Collection[str]) -> None:
        self._source = source
        self._names = [name for name in source.names() if name not in without]
        self._known = frozenset(self._names)

    def names(self) -> Sequence[str]:
        """The source's names but for those left out."""
        return self._names

    def info(self, name: str) -> TensorInfo:
        """Type and shape of one tensor; KeyError for one that is left out."""
        self._require(name)
        return self._source.info(name)

    def read(self, name: str) -> Array:
        """The data of one tensor; KeyError for one that is left out."""
        self._require(name)
        return self._source.read(name)

    def pieces(self, name: str, axis: int = 0, height: int | None = None) -> Iterator[Task[Array]]:
        """One tensor in pieces; KeyError for one that is left out."""
        self._require(name)
        return pieces_of(self._source, name, axis, height)

    def _require(self, name: str) -> None:
        if name not in self._known:
            raise KeyError(name)
