"""One A for linear layers that read the same input.

    [x·A_q  x·A_k  x·A_v]   is   x · [A_q A_k A_v]

A graph multiplies by the joint A [in, sum of ranks] once and cuts the product where ``ranks`` says, a slot as well;
where all slots have one fixed rank there are no ``ranks``, and the cuts are even. Each layer keeps a B of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import numpy as np

from peft_deploy.errors import AdapterError
from peft_deploy.signature import LORA_A, LORA_B, LORA_RANKS, modules_of
from peft_deploy.weights.source import Array


def separate(tensors: Mapping[str, Array], where: str) -> dict[str, Array]:
    """The tensors of an adapter with an A for each of its modules; everything else as it is.

    A module that has no columns, or zeros in place of an A and no B at all, is not the adapter's.

    Args:
        tensors: by the names of slots.
        where: they are from, for messages.

    Raises:
        AdapterError: the ranks are not those of the A that they belong to, or a module has two As.
    """
    result = {}
    for name, array in tensors.items():
        if name.endswith(LORA_RANKS):
            joint_A = name.removesuffix(LORA_RANKS) + LORA_A
            if joint_A not in tensors or not _sharing(joint_A):
                raise AdapterError(f"{where}: {name} has no lora_A of several layers beside it")
            continue
        for own, part in _parts(tensors, name, array, where):
            if own in result:
                raise AdapterError(f"{where} holds more than one lora_A of {own}")
            result[own] = part
    return result


def _sharing(slot: str) -> list[str]:
    """The modules whose As stand side by side in a slot; none for any other kind of slot."""
    modules = modules_of(slot.removesuffix(LORA_A))
    return modules if slot.endswith(LORA_A) and len(modules) > 1 else []


def _parts(
    tensors: Mapping[str, Array], name: str, array: Array, where: str
) -> Iterator[tuple[str, Array]]:
    """What a tensor consists of: a joint A of each module's, anything else of itself."""
    modules = _sharing(name)
    if not modules:
        yield name, array
        return
    cuts = np.cumsum(_ranks(tensors, name.removesuffix(LORA_A), len(modules), where))[:-1]
    for module, A in zip(modules, np.split(array, cuts, axis=1), strict=True):
        if module + LORA_B in tensors or A.any():
            yield module + LORA_A, A


def _ranks(tensors: Mapping[str, Array], joint: str, count: int, where: str) -> list[int]:
    """How many columns of a joint A are each module's."""
    A, given = tensors[joint + LORA_A], tensors.get(joint + LORA_RANKS)
    width = A.shape[1] if A.ndim == 2 else -1
    found = np.full(count, width // count) if given is None else given
    ranks = [int(rank) for rank in found.ravel()]  # Python's integers do not overflow
    if found.shape != (count,) or min(ranks) < 0 or sum(ranks) != width:
        said = "" if given is None else f", the ranks {given.tolist()}"
        raise AdapterError(
            f"{where}: {joint}{LORA_A} is {list(A.shape)}{said}; its columns should be the ranks of {count} layers"
        )
    return ranks


def join(tensors: Mapping[str, Array], slots: Collection[str], where: str) -> dict[str, Array]:
    """The inverse of :func:`separate` for a graph: modules whose A is one slot there get one A.

    Args:
        tensors: an adapter's, an A for each of its modules.
        slots: names of the graph's.
        where: they are from, for messages.

    Raises:
        AdapterError: As that are to stand side by side do not fit each other.
    """
    result = dict(tensors)
    for slot in slots:
        own = [result.pop(module + LORA_A, None) for module in _sharing(slot)]
        given = [A for A in own if A is not None]
        if not given:
            continue
        ranks = slot.removesuffix(LORA_A) + LORA_RANKS
        even = ranks not in slots
        _require_alike(given, slot, where, even=even)
        empty = np.zeros((given[0].shape[0], given[0].shape[1] if even else 0), given[0].dtype)
        columns = [empty if A is None else A for A in own]
        result[slot] = np.concatenate(columns, axis=1)
        if not even:
            result[ranks] = np.array([A.shape[1] for A in columns], np.int64)
    return result


def _require_alike(given: list[Array], slot: str, where: str, *, even: bool) -> None:
    """Matrices of one type and height, and where columns are shared out evenly of one width."""
    kinds = {(A.dtype.name, A.ndim, A.shape[:1], A.shape[1:] if even else None) for A in given}
    if len(kinds) > 1 or given[0].ndim != 2:
        found = ", ".join(f"{A.dtype.name} {list(A.shape)}" for A in given)
        raise AdapterError(
            f"{where}: the parts of {slot} are no matrices that fit beside each other: {found}"
        )
