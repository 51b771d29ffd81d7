"""How a tensor is kept in a file: as it is, or as several tensors that stand for it.

What is computed with later is what was written, not what was read. So a way to keep tensors goes in both directions:
``encode`` makes the tensors of the file, ``decode`` the numbers that a graph computes with. A check that compares a
bundle with a model whose weights were encoded and decoded sees every fault of the graph or the file, however coarse
the numbers are; what the coarseness itself costs is measured apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from peft_deploy.weights.cast import cast_array
from peft_deploy.weights.pieces import Task, pieces_of, pieces_of_array
from peft_deploy.weights.source import FLOATING, Array, TensorInfo, TensorSource


@runtime_checkable
class Storage(Protocol):
    """One way to keep a tensor.

    Columns must not depend on each other (the last axis of a linear weight [in, out]): the weights of several layers
    may be put side by side, or apart again, between the checkpoint and the file.
    """

    @property
    def name(self) -> str:
        """For the manifest and for messages, such as ``int4``."""
        ...

    def parts(self, info: TensorInfo) -> Mapping[str, TensorInfo]:
        """What the file gets, by what is appended to the tensor's name; known before the tensor is read."""
        ...

    def encode(self, tensor: Array, name: str) -> Mapping[str, Array]:
        """The contents of :meth:`parts`.

        Args:
            tensor: in float32.
            name: of the tensor, for messages.

        Raises:
            CheckpointError: it holds what cannot be kept so.
        """
        ...

    def decode(self, parts: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
        """The numbers that a graph computes with, in float32.

        Args:
            parts: from :meth:`encode`.
            shape: of the tensor.
        """
        ...


# Parameter → how it is kept; the others are kept as they are.
StoragePlan = Mapping[str, Storage]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is in a file as several others.

    Args:
        info: of the tensor itself.
        storage: how it is kept.
        parts: what is appended to its name → the name in the file.
    """

    info: TensorInfo
    storage: Storage
    parts: Mapping[str, str]


class EncodedTensors:
    """A :class:`~peft_deploy.weights.source.TensorSource` of what goes into the file.

    Holds the parts of one tensor at a time, those that were not asked for yet.

    Args:
        source: the tensors.
        plan: how they are kept; names that the source does not have are of no consequence.

    Attributes:
        stored: tensor → what stands for it, for those in the plan.
    """

    def __init__(self, source: TensorSource, plan: StoragePlan) -> None:
        self._source = source
        self._infos: dict[str, TensorInfo] = {}
        self._origins: dict[str, tuple[StoredTensor, str]] = {}
        self.stored: dict[str, StoredTensor] = {}
        for name in source.names():
            info = source.info(name)
            if name not in plan:
                self._infos[name] = info
                continue
            found = {suffix: f"{name}{suffix}" for suffix in plan[name].parts(info)}
            stored = self.stored[name] = StoredTensor(info, plan[name], found)
            for suffix, part in plan[name].parts(info).items():
                self._infos[found[suffix]] = TensorInfo(found[suffix], part.dtype, part.shape)
                self._origins[found[suffix]] = stored, suffix
        self._waiting: dict[str, Array] = {}

    def names(self) -> Sequence[str]:
        """Of the tensors in the file."""
        return list(self._infos)

    def info(self, name: str) -> TensorInfo:
        """Type and shape of one tensor of the file; KeyError if unknown."""
        return self._infos[name]

    def read(self, name: str) -> Array:
        """One tensor of the file; KeyError if unknown.

        Raises:
            CheckpointError: see :meth:`Storage.encode`.
        """
        if name not in self._origins:
            return self._source.read(self._infos[name].name)
        if name not in self._waiting:
            stored, _ = self._origins[name]
            tensor = self._source.read(stored.info.name)
            encoded = stored.storage.encode(tensor, stored.info.name)
            self._waiting = {stored.parts[suffix]: part for suffix, part in encoded.items()}
        return self._waiting.pop(name)

    def pieces(self, name: str) -> Iterator[Task[Array]]:
        """One tensor of the file in pieces; errors as in :meth:`read`."""
        if name not in self._origins:
            return pieces_of(self._source, self._infos[name].name)
        return pieces_of_array(self.read(name))


class DecodedTensors:
    """A :class:`~peft_deploy.weights.source.TensorSource` of the numbers that a graph computes with, in float32.

    Args:
        source: the tensors, in the type that those outside of the plan are written in.
        plan: how they are kept.
    """

    def __init__(self, source: TensorSource, plan: StoragePlan) -> None:
        self._source = source
        self._plan = plan

    def names(self) -> Sequence[str]:
        """The source's names."""
        return self._source.names()

    def info(self, name: str) -> TensorInfo:
        """Type and shape of one tensor; KeyError if unknown."""
        info = self._source.info(name)
        return TensorInfo(name, "float32" if info.dtype in FLOATING else info.dtype, info.shape)

    def read(self, name: str) -> Array:
        """One tensor."""
        tensor, storage = self._source.read(name), self._plan.get(name)
        if storage is None:
            return cast_array(tensor, "float32", name=name)
        return storage.decode(storage.encode(tensor, name), tensor.shape)
