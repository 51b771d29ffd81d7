"""The places of a bundle's graph that an adapter can fill: inputs with a default, which onnxruntime may override."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from peft_deploy.adapters.formats.joint_lora import separate
from peft_deploy.errors import AdapterError, BundleError, listed
from peft_deploy.signature import LORA_A, LORA_B, modules_of
from peft_deploy.weights import cast_array
from peft_deploy.weights.rounding import NARROW
from peft_deploy.weights.source import Array


@dataclass(frozen=True)
class Slot:
    """One such input.

    Args:
        name: in the graph.
        dtype: numpy's name of its element type.
        dims: an int for a fixed dimension, a name for one that is left open.
    """

    name: str
    dtype: str
    dims: tuple[int | str, ...]

    def takes(self, array: Array) -> bool:
        """Whether the array has the slot's type, and its size in every fixed dimension."""
        return (
            array.dtype.name == self.dtype
            and array.ndim == len(self.dims)
            and all(
                d == n for d, n in zip(self.dims, array.shape, strict=True) if isinstance(d, int)
            )
        )

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join(map(str, self.dims))}]"


def read_slots(model: Path) -> dict[str, Slot]:
    """All slots of a graph by name; no weight is read.

    Raises:
        BundleError: the file is not an ONNX model.
    """
    import onnx_ir as ir

    try:
        graph = ir.load(model).graph
    except Exception as exc:  # protobuf's and onnx-ir's errors have no common base
        raise BundleError(f"{model} is not an ONNX model, or is damaged: {exc}") from exc
    slots = {}
    for value in graph.inputs:
        if value.name is None or value.name not in graph.initializers or value.dtype is None:
            continue
        dims = () if value.shape is None else tuple(value.shape)
        slots[value.name] = Slot(
            value.name,
            value.dtype.numpy().name,
            tuple(d if isinstance(d, int) else str(d.value) for d in dims),
        )
    return slots


def fixed_ranks(slots: Mapping[str, Slot]) -> dict[str, int]:
    """Module → the rank that its slots have; none for slots of any rank.

    Args:
        slots: of a graph, by name.
    """
    ranks = {}
    for name, slot in slots.items():
        modules = modules_of(name.removesuffix(LORA_A))
        width = slot.dims[-1] if name.endswith(LORA_A) else None
        if isinstance(width, int):
            ranks.update(dict.fromkeys(modules, width // len(modules)))
    return ranks


def in_types_of(slots: Mapping[str, Slot], tensors: Mapping[str, Array]) -> dict[str, Array]:
    """An adapter's float32 tensors in the 16-bit types of a graph's slots; everything else as it is.

    Args:
        slots: of the graph.
        tensors: an A for each module, also where the graph has one for several.

    Raises:
        CheckpointError: a value is too large for the type.
    """
    result = {}
    for name, array in tensors.items():
        slot = slots.get(name) or slots.get(name.removesuffix(LORA_A) + LORA_B)
        narrow = slot is not None and slot.dtype in NARROW and array.dtype == np.float32
        result[name] = cast_array(array, slot.dtype, name=name) if slot and narrow else array
    return result


def check_slots(slots: Mapping[str, Slot], tensors: Mapping[str, Array], bundle: Path) -> None:
    """Passes when a graph can take all tensors of an adapter.

    Raises:
        AdapterError: names that it does not have, other types or shapes, an A without its B or of another rank.
    """
    unknown = [name for name in tensors if name not in slots]
    if unknown:
        raise AdapterError(
            f"the graph of {bundle} has no slots for these tensors of the adapter:\n{listed(unknown)}",
            hint="export it again with slots for the modules that this adapter changes",
        )
    wrong = [
        f"{name}: {array.dtype.name} {list(array.shape)}, the slot is {slots[name]}"
        for name, array in tensors.items()
        if not slots[name].takes(array)
    ]
    if wrong:
        raise AdapterError(f"the slots of {bundle} are of another type or shape:\n{listed(wrong)}")
    _check_pairs(separate(tensors, "the adapter"))


def _check_pairs(tensors: Mapping[str, Array]) -> None:
    """A and B of a module come together and share their rank: beside the other's default they would not multiply."""
    wrong = []
    for name, array in tensors.items():
        for own, other, inner, outer in ((LORA_A, LORA_B, 1, 0), (LORA_B, LORA_A, 0, 1)):
            if not name.endswith(own):
                continue
            partner = tensors.get(name.removesuffix(own) + other)
            if partner is None:
                wrong.append(f"{name}: its {other[1:7]} is missing")
            elif own == LORA_A and array.shape[inner] != partner.shape[outer]:
                wrong.append(
                    f"{name}: rank {array.shape[inner]}, its lora_B has {partner.shape[outer]}"
                )
    if wrong:
        raise AdapterError(f"A and B of the adapter do not fit each other:\n{listed(wrong)}")
