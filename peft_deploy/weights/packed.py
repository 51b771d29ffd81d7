"""A source in which some matrices stand side by side as one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import zip_longest

import numpy as np

from peft_deploy.errors import CheckpointError
from peft_deploy.weights.blocks import block_height, contiguous
from peft_deploy.weights.pieces import Task, pieces_of
from peft_deploy.weights.source import DTYPES, Array, TensorInfo, TensorSource


class PackedTensors:
    """A :class:`~peft_deploy.weights.source.TensorSource` with packed tensors in place of their parts.

    Reading one holds it and one of its parts; in pieces, a few pieces of each part.

    Args:
        source: the tensors.
        packed: name of each packed tensor → those that it is made of, joined along the last axis.

    Raises:
        CheckpointError: tensors that are to be packed differ in type, or in more than the last axis.
    """

    def __init__(self, source: TensorSource, packed: Mapping[str, Sequence[str]]) -> None:
        self._source = source
        self._packed = {name: tuple(parts) for name, parts in packed.items()}
        self._infos = {name: self._join(name, parts) for name, parts in self._packed.items()}
        first = {parts[0]: name for name, parts in self._packed.items()}
        later = {part for parts in self._packed.values() for part in parts[1:]}
        self._names = [first.get(name, name) for name in source.names() if name not in later]
        self._plain = frozenset(self._names) - self._packed.keys()

    def names(self) -> Sequence[str]:
        """The source's names, each packed tensor where its first part was."""
        return self._names

    def info(self, name: str) -> TensorInfo:
        """Type and shape of one tensor; KeyError for an unknown one, and for a part."""
        return self._infos[name] if name in self._packed else self._source.info(self._known(name))

    def read(self, name: str) -> Array:
        """One tensor; KeyError for an unknown one, and for a part."""
        if name not in self._packed:
            return self._source.read(self._known(name))
        info, column = self._infos[name], 0
        result = np.empty(info.shape, DTYPES[info.dtype])
        for part in self._packed[name]:
            value = contiguous(self._source.read(part))
            columns = slice(column, column + value.shape[-1])
            result[..., columns] = value
            column = columns.stop
        return result

    def pieces(self, name: str, axis: int = 0, height: int | None = None) -> Iterator[Task[Array]]:
        """One tensor in pieces; KeyError for an unknown one, and for a part."""
        if name not in self._packed:
            yield from pieces_of(self._source, self._known(name), axis, height)
            return
        info, parts = self._infos[name], self._packed[name]
        if axis == len(info.shape) - 1:  # along which the parts are joined
            if height is not None:
                raise ValueError(f"{name} is packed, and its columns come as its parts give them")
            for part in parts:
                yield from pieces_of(self._source, part, axis)
            return
        if height is None:
            itemsize = max(np.dtype(np.float32).itemsize, DTYPES[info.dtype].itemsize)
            height = block_height(info.shape, itemsize)
        rows = [pieces_of(self._source, part, axis, height) for part in parts]
        for tasks in zip_longest(*rows):
            yield partial(_side_by_side, tasks, name)

    def _known(self, name: str) -> str:
        if name not in self._plain:
            raise KeyError(name)
        return name

    def _join(self, name: str, parts: Sequence[str]) -> TensorInfo:
        infos = [self._source.info(part) for part in parts]
        first = infos[0]
        for info in infos:
            if not info.shape or info.shape[:-1] != first.shape[:-1] or info.dtype != first.dtype:
                raise CheckpointError(
                    f"{info.name}, {info.dtype} {list(info.shape)}, cannot stand beside {first.name}, "
                    f"{first.dtype} {list(first.shape)}, in {name}"
                )
        width = sum(info.shape[-1] for info in infos)
        return TensorInfo(name, first.dtype, (*first.shape[:-1], width))


def _side_by_side(tasks: Sequence[Task[Array] | None], name: str) -> Array:
    """The same rows of all parts."""
    rows = [task() for task in tasks if task is not None]
    if len(rows) < len(tasks) or len({len(part) for part in rows}) > 1:
        raise CheckpointError(f"the parts of {name} are not of the same length")
    return np.concatenate(rows, -1)
