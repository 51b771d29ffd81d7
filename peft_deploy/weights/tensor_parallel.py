"""One set of tensors from those of several tensor-parallel ranks, and back.

The ranks of a column-parallel layer share A [in, R] and hold B [R, out / N]; those of a
row-parallel one hold A [in / N, R] and share B [R, out]. R is never divided.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from peft_deploy.errors import AdapterError, listed
from peft_deploy.weights.source import Array

AxisOf = Callable[[str], "int | None"]


def merge_shards(shards: Sequence[Mapping[str, Array]], axis_of: AxisOf) -> dict[str, Array]:
    """The tensors as a single rank would hold them.

    Args:
        shards: each rank's tensors, in the order of the ranks.
        axis_of: the axis along which a tensor is spread; None for one that all ranks share.

    Raises:
        AdapterError: the ranks hold different tensors, shapes or types, or what they share differs.
    """
    if not shards:
        raise AdapterError("there is no rank to merge")
    _check_names(shards)
    return {name: _merge(name, [s[name] for s in shards], axis_of(name)) for name in shards[0]}


def split_shards(
    tensors: Mapping[str, Array], degree: int, axis_of: AxisOf
) -> list[dict[str, Array]]:
    """What each of several ranks holds: the inverse of :func:`merge_shards`.

    Args:
        tensors: as a single rank holds them.
        degree: number of ranks, at least 1.
        axis_of: as for :func:`merge_shards`.

    Raises:
        AdapterError: a size that does not divide by the number of ranks.
    """
    if degree < 1:
        raise AdapterError(f"{degree} ranks: there has to be at least one")
    shards: list[dict[str, Array]] = [{} for _ in range(degree)]
    for name, array in tensors.items():
        axis = axis_of(name)
        parts = [array] * degree if axis is None else _split(name, array, degree, axis)
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = np.ascontiguousarray(part)
    return shards


def _check_names(shards: Sequence[Mapping[str, Array]]) -> None:
    everything = set().union(*shards)
    for rank, shard in enumerate(shards):
        missing = everything - shard.keys()
        if missing:
            raise AdapterError(
                f"rank {rank} lacks tensors that other ranks hold:\n{listed(missing)}",
                hint="the files may come from different checkpoints",
            )


def _merge(name: str, parts: Sequence[Array], axis: int | None) -> Array:
    forms = {(part.dtype.name, part.shape) for part in parts}
    if len(forms) > 1:
        texts = [f"rank {i}: {p.dtype.name} {list(p.shape)}" for i, p in enumerate(parts)]
        raise AdapterError(f"{name} differs between the ranks:\n{listed(texts)}")
    if axis is not None:
        _check_axis(name, parts[0], axis)
        return np.concatenate(parts, axis=axis)
    for rank, part in enumerate(parts):
        if part.tobytes() != parts[0].tobytes():
            worst = np.abs(part.astype(np.float64) - parts[0].astype(np.float64)).max()
            raise AdapterError(
                f"{name} should be the same on all ranks, but rank {rank} differs from rank 0 by "
                f"up to {worst:.3g}",
                hint="the files may come from different steps, or the layer was not kept in step",
            )
    return parts[0]


def _split(name: str, array: Array, degree: int, axis: int) -> list[Array]:
    _check_axis(name, array, axis)
    if array.shape[axis] % degree:
        raise AdapterError(
            f"{name} is {list(array.shape)}; its axis {axis} cannot be divided among {degree} ranks",
            hint=f"the number of ranks has to divide {array.shape[axis]}",
        )
    return np.split(array, degree, axis=axis)


def _check_axis(name: str, array: Array, axis: int) -> None:
    if array.ndim <= axis:
        raise AdapterError(f"{name} is {list(array.shape)}; it has no axis {axis} to be spread")
