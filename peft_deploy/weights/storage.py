"""How a tensor is kept in a file: as it is, or as several tensors that stand for it.

What is computed with later is what was written, not what was read. So a way to keep tensors goes in both directions:
``encode`` makes the tensors of the file, ``decode`` the numbers that a graph computes with. A check that compares a
bundle with a model whose weights were encoded and decoded sees every fault of the graph or the file, however coarse
the numbers are; what the coarseness itself costs is measured apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Protocol, runtime_checkable

from peft_deploy.weights.cast import cast_array
from peft_deploy.weights.pieces import Task, in_order, joined, pieces_of
from peft_deploy.weights.source import FLOATING, Array, TensorInfo, TensorSource


@runtime_checkable
class Storage(Protocol):
    """One way to keep a tensor, some of its columns (or rows) at a time.

    Columns must not depend on each other (the last axis of a linear weight [in, out]): the weights of several layers
    may be put side by side, or apart again, between the checkpoint and the file.
    """

    @property
    def name(self) -> str:
        """For the manifest and for messages, such as ``int4``."""
        ...

    @property
    def axis(self) -> int:
        """Along which slices of a tensor can be encoded and decoded by themselves: 1, or 0 for what is never packed.

        It is the first axis of every part.
        """
        ...

    def parts(self, info: TensorInfo) -> Mapping[str, TensorInfo]:
        """What the file gets, by what is appended to the tensor's name; known before the tensor is read."""
        ...

    def encode(self, tensor: Array, name: str) -> Mapping[str, Array]:
        """The contents of :meth:`parts`.

        Args:
            tensor: in float32, in any memory order; whole, or a slice of it along :attr:`axis`.
            name: of the tensor, for messages.

        Raises:
            CheckpointError: it holds what cannot be kept so.
        """
        ...

    def decode(self, parts: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
        """The numbers that a graph computes with, in float32.

        Args:
            parts: from :meth:`encode`.
            shape: of the tensor, or of that slice of it.
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

    Tensors are encoded in pieces. While the pieces of one part are taken, those of the tensor's other parts are kept
    until they are asked for, which has to come next.

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
        self._waiting: dict[str, list[_Slice]] = {}

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
        return joined(self._infos[name], in_order(self.pieces(name)))

    def pieces(self, name: str, axis: int = 0, height: int | None = None) -> Iterator[Task[Array]]:
        """One tensor of the file in pieces; errors as in :meth:`read`."""
        if name not in self._origins:
            yield from pieces_of(self._source, self._infos[name].name, axis, height)
            return
        if axis != 0 or height is not None:
            raise ValueError(
                f"{name} is encoded, and comes in rows only, as many as it was encoded in"
            )
        if name not in self._waiting:
            stored, _ = self._origins[name]
            tasks = pieces_of(self._source, stored.info.name, stored.storage.axis)
            slices = [_Slice(stored, task) for task in tasks]
            self._waiting = dict.fromkeys(stored.parts.values(), slices)
        _, suffix = self._origins[name]
        for one in self._waiting.pop(name):
            yield partial(one.take, suffix)


class _Slice:
    """A slice of a tensor, encoded when the first of its parts is taken.

    Args:
        stored: the tensor.
        task: gives the slice.
    """

    def __init__(self, stored: StoredTensor, task: Task[Array]) -> None:
        self._stored = stored
        self._task: Task[Array] | None = task
        self._parts: dict[str, Array] = {}
        self._lock = Lock()  # both parts may be asked for at one time

    def take(self, suffix: str) -> Array:
        """One of the parts, which can be taken once."""
        with self._lock:
            if self._task is not None:
                encoded = self._stored.storage.encode(self._task(), self._stored.info.name)
                self._parts, self._task = dict(encoded), None
            return self._parts.pop(suffix)


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
        """One tensor; beside it, only pieces of what it is made of are held."""
        storage = self._plan.get(name)
        if storage is None:
            return cast_array(self._source.read(name), "float32", name=name)
        numbers = (
            partial(_there_and_back, storage, task, name)
            for task in pieces_of(self._source, name, storage.axis)
        )
        return joined(self.info(name), in_order(numbers), storage.axis)


def _there_and_back(storage: Storage, task: Task[Array], name: str) -> Array:
    tensor = task()
    return storage.decode(storage.encode(tensor, name), tensor.shape)
