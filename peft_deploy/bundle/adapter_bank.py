"""A bank of adapters: the slots that hold several at once, and single adapters stacked to fill them.

Entry 0 of every slot is zeros, for rows without an adapter; adapters follow from 1 in their order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from peft_deploy.adapters.formats.joint_lora import separate
from peft_deploy.bundle.slots import Slot
from peft_deploy.signature import BANK_A, BANK_B, LORA_A, LORA_B, LORA_RANKS, modules_of
from peft_deploy.weights.source import DTYPES, Array

BANK_FILE = "adapter_bank.onnx_adapter"  # all of a bundle's adapters, for other runtimes
_SINGLE = {BANK_A: LORA_A, BANK_B: LORA_B}


def single_name(slot: str) -> str:
    """What a slot of a bank is called in the file of one adapter; other names stay as they are."""
    for bank, single in _SINGLE.items():
        if slot.endswith(bank):
            return slot.removesuffix(bank) + single
    return slot


def is_bank_slot(slot: str) -> bool:
    """Whether a slot holds several adapters at once."""
    return slot.endswith(tuple(_SINGLE))


def adapter_slots(slots: Mapping[str, Slot]) -> dict[str, Slot]:
    """The slots as the file of one adapter fills them: those of a bank without their first dimension.

    Args:
        slots: of the graph, by name.
    """
    return {
        single_name(name): replace(slot, name=single_name(name), dims=slot.dims[1:])
        if is_bank_slot(name)
        else slot
        for name, slot in slots.items()
    }


def stack_adapters(
    slots: Mapping[str, Slot], adapters: Sequence[Mapping[str, Array]]
) -> dict[str, Array]:
    """Every slot of a bank with all adapters in it.

    Each layer is as wide as its widest adapter; smaller ranks and layers that an adapter leaves alone are zeros.

    Args:
        slots: of the graph, by name; those that are not of the bank are left out.
        adapters: A [in, R], joint or not, and B [R, out] by their names in a file, of the slots' types.

    Returns:
        Slot → [1 + adapters, in, R] or [1 + adapters, R, out]. An A of several layers has the columns of all of them,
        and their ranks beside it, which are those of every entry.
    """
    own = [separate(tensors, "the adapter") for tensors in adapters]
    stacked = {}
    for name, slot in slots.items():
        if name.endswith(BANK_A):
            modules = modules_of(name.removesuffix(BANK_A))
            parts = [_stack(slot, [tensors.get(m + LORA_A) for tensors in own]) for m in modules]
            stacked[name] = np.concatenate(parts, axis=-1)
            if len(modules) > 1:
                ranks = np.array([part.shape[-1] for part in parts], np.int64)
                stacked[name.removesuffix(BANK_A) + LORA_RANKS] = ranks
        elif name.endswith(BANK_B):
            stacked[name] = _stack(slot, [tensors.get(single_name(name)) for tensors in own])
    return stacked


def _stack(slot: Slot, arrays: Sequence[Array | None]) -> Array:
    """The matrices of one layer, as wide as the widest; the slot tells the size that is fixed."""
    given = {entry: array for entry, array in enumerate(arrays, 1) if array is not None}
    sizes = [
        dim if isinstance(dim, int) else max((a.shape[axis] for a in given.values()), default=0)
        for axis, dim in enumerate(slot.dims[1:])
    ]
    stacked = np.zeros((len(arrays) + 1, *sizes), DTYPES[slot.dtype])
    for entry, array in given.items():
        stacked[entry, : array.shape[0], : array.shape[1]] = array
    return stacked


def bank_capacity(graph: Mapping[str, Any]) -> int | None:
    """How many adapters a bundle's bank is meant to hold; None for a bundle without a bank.

    Args:
        graph: what the manifest says of it.
    """
    bank = graph.get("adapter_bank")
    return None if bank is None else int(bank["capacity"])
