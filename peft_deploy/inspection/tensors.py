"""Sizes of files, and what a set of tensors adds up to."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from peft_deploy.weights import Array, TensorInfo


@dataclass(frozen=True)
class FileSize:
    """A file and its size in bytes."""

    name: str
    bytes: int


@dataclass(frozen=True)
class TensorTotals:
    """A set of tensors in numbers.

    Args:
        tensors: how many.
        parameters: elements of all of them.
        bytes: their data.
        dtypes: element type → elements of that type, the commonest first.
    """

    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]

    @classmethod
    def of(cls, infos: Iterable[TensorInfo]) -> TensorTotals:
        """The totals of tensors that have not been read."""
        known = list(infos)
        dtypes: dict[str, int] = {}
        for info in known:
            dtypes[info.dtype] = dtypes.get(info.dtype, 0) + math.prod(info.shape)
        return cls(
            tensors=len(known),
            parameters=sum(dtypes.values()),
            bytes=sum(info.nbytes for info in known),
            dtypes=dict(sorted(dtypes.items(), key=lambda item: -item[1])),
        )


def file_sizes(paths: Iterable[Path], root: Path) -> tuple[FileSize, ...]:
    """The files with their sizes, named relative to ``root``; links count as what they lead to."""
    return tuple(FileSize(p.relative_to(root).as_posix(), p.stat().st_size) for p in paths)


def info_of(name: str, array: Array) -> TensorInfo:
    """Name, type and shape of a tensor that has been read."""
    return TensorInfo(name, array.dtype.name, tuple(int(n) for n in array.shape))
