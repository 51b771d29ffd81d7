"""One A for linear layers that read the same input.

    [x·A_q  x·A_k  x·A_v]   is   x · [A_q A_k A_v]

A graph multiplies by the joint A [in, sum of ranks] once and cuts the product where ``ranks`` says, a slot as well;
where all slots have one fixed rank there are no ``ranks``, and the cuts are even. Each layer keeps a B of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

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
        AdapterError: the ranks are not those of the A that they belong to.
    """
    result = {}
    for name, array in tensors.items():
        joint = name.removesuffix(LORA_A)
        modules = modules_of(joint)
        if name.endswith(LORA_RANKS):
            if name.removesuffix(LORA_RANKS) + LORA_A not in tensors:
                raise AdapterError(f"{where}: {name} has no lora_A beside it")
        elif not name.endswith(LORA_A) or len(modules) == 1:
            result[name] = array
        else:
            cuts = np.cumsum(_ranks(tensors, joint, len(modules), where))[:-1]
            for module, A in zip(modules, np.split(array, cuts, axis=1), strict=True):
                if module + LORA_B in tensors or A.any():
                    result[module + LORA_A] = A
    return result


def _ranks(tensors: Mapping[str, Array], joint: str, count: int, where: str) -> list[int]:
    """How many columns of a joint A are each module's."""
    A, given = tensors[joint + LORA_A], tensors.get(joint + LORA_RANKS)
    width = A.shape[1] if A.ndim == 2 else -1
    ranks = np.full(count, width // count) if given is None else given
    if ranks.shape != (count,) or ranks.min() < 0 or ranks.sum() != width:
        said = "" if given is None else f", the ranks {ranks.tolist()}"
        raise AdapterError(
            f"{where}: {joint}{LORA_A} is {list(A.shape)}{said}; its columns should be the ranks of {count} layers"
        )
    return [int(rank) for rank in ranks]


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
        joint = slot.removesuffix(LORA_A)
        modules = modules_of(joint)
        if not slot.endswith(LORA_A) or len(modules) == 1:
            continue
        own = [result.pop(module + LORA_A, None) for module in modules]
        given = [A for A in own if A is not None]
        if not given:
            continue
        even = joint + LORA_RANKS not in slots
        empty = np.zeros((given[0].shape[0], given[0].shape[1] if even else 0), given[0].dtype)
        columns = [empty if A is None else A for A in own]
        _require_alike(columns, slot, where, even=even)
        result[slot] = np.concatenate(columns, axis=1)
        if not even:
            result[joint + LORA_RANKS] = np.array([A.shape[1] for A in columns], np.int64)
    return result


def _require_alike(columns: list[Array], slot: str, where: str, *, even: bool) -> None:
    kinds = {(A.dtype.name, A.shape[0], A.shape[1] if even else None) for A in columns}
    if len(kinds) > 1:
        found = ", ".join(f"{A.dtype.name} {list(A.shape)}" for A in columns)
        raise AdapterError(f"{where}: the parts of {slot} do not fit each other: {found}")
