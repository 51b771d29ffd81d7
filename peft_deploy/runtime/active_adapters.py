"""Several adapters in a graph's slots at the same time, each changing other layers, such as LoRA behind a prefix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from peft_deploy.adapters.formats.joint_lora import join, separate
from peft_deploy.errors import AdapterError
from peft_deploy.runtime._ort_values import to_ort
from peft_deploy.runtime.loaded_adapter import LoadedAdapter
from peft_deploy.runtime.runner import Array

if TYPE_CHECKING:
    import onnxruntime as ort


def slot_values(
    adapters: Sequence[LoadedAdapter], scale: float, device: str
) -> dict[str, ort.OrtValue]:
    """Slot → value with all of them active; a joint A of layers that different ones change is put together.

    Args:
        adapters: of one graph.
        scale: multiplies what LoRA adds.
        device: ``"cpu"`` or ``"cuda"``.

    Raises:
        AdapterError: two change the same layer, or a scaled B does not fit its element type.
        ConfigError: the scale is not a finite number.
    """
    values = {slot: value for a in adapters for slot, value in a.values(scale).items()}
    if len(adapters) > 1:
        together = _disjoint(adapters)
        filled = Counter(slot for adapter in adapters for slot in adapter.tensors)
        shared = {slot for slot, count in filled.items() if count > 1}
        joint = join(together, shared, " and ".join(adapter.name for adapter in adapters))
        values |= {slot: to_ort(joint[slot], device) for slot in shared}
    return values


def _disjoint(adapters: Sequence[LoadedAdapter]) -> Mapping[str, Array]:
    """All tensors by module. Of two for the same one onnxruntime would let one win without a word."""
    together: dict[str, Array] = {}
    owner: dict[str, str] = {}
    for adapter in adapters:
        own = separate(adapter.tensors, adapter.name)
        both = {owner[name] for name in own if name in owner}
        if both:
            raise AdapterError(
                f"the adapters {', '.join(sorted(both))} and {adapter.name} fill the same slots, so they cannot "
                "be active together",
                hint="name one of them",
            )
        owner.update(dict.fromkeys(own, adapter.name))
        together |= own
    return together
