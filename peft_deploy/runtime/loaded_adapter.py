"""An adapter in memory, ready to be put into a graph's slots."""

from __future__ import annotations

import math
import threading
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from peft_deploy.adapters.formats.joint_lora import join, separate
from peft_deploy.adapters.formats.onnx_adapter import refuse_bank
from peft_deploy.adapters.formats.onnx_file import UNKNOWN_BASE, model_version, read_onnx_file
from peft_deploy.bundle.prefixes import check_prefix_tensors
from peft_deploy.bundle.slots import Slot, check_slots, in_types_of
from peft_deploy.errors import AdapterError, ConfigError
from peft_deploy.runtime._ort_values import to_ort
from peft_deploy.runtime.runner import Array
from peft_deploy.signature import BANK_B, LORA_B, PREFIX_KEY_TEMPLATE

if TYPE_CHECKING:
    import onnxruntime as ort

KEPT_SCALES = (
    4  # scaled copies of B that an adapter keeps; the one that was not used for longest goes first
)


class LoadedAdapter:
    """The tensors of one adapter on a device; never changes, so that any number of requests may share it.

    Args:
        name: what it goes by.
        path: the file that it was read from.
        tensors: slot → value, of the slots' types.
        device: ``"cpu"`` or ``"cuda"``.
    """

    def __init__(self, name: str, path: Path, tensors: Mapping[str, Array], device: str) -> None:
        self.name = name
        self.path = path
        self.tensors = dict(tensors)
        self.rank = max((a.shape[0] for n, a in tensors.items() if n.endswith(LORA_B)), default=0)
        keys = (a for n, a in tensors.items() if n == PREFIX_KEY_TEMPLATE % 0)
        self.prefix_tokens = next((int(array.shape[2]) for array in keys), 0)
        self._device = device
        self._B = {n: array for n, array in tensors.items() if n.endswith((LORA_B, BANK_B))}
        self._values = {name: to_ort(array, device) for name, array in tensors.items()}
        self._scaled: OrderedDict[float, dict[str, ort.OrtValue]] = OrderedDict()
        self._lock = threading.Lock()

    def values(self, scale: float = 1.0) -> dict[str, ort.OrtValue]:
        """Slot → value, with every B multiplied by ``scale``.

        Raises:
            ConfigError: the scale is not a finite number.
            AdapterError: a scaled B does not fit its element type.
        """
        if not math.isfinite(scale):
            raise ConfigError(f"the scale is {scale}; it has to be a finite number")
        if scale == 1:
            return dict(self._values)
        with self._lock:
            scaled = self._scaled.pop(scale, None)
        if scaled is None:
            scaled = {
                n: to_ort(self._times(n, B, scale), self._device) for n, B in self._B.items()
            }
        with self._lock:
            self._scaled[scale] = scaled
            while len(self._scaled) > KEPT_SCALES:
                self._scaled.popitem(last=False)
        return {**self._values, **scaled}

    def _times(self, name: str, B: Array, scale: float) -> Array:
        with np.errstate(over="ignore"):
            product: Array = (B.astype(np.float64) * scale).astype(B.dtype)
        if not np.isfinite(product.astype(np.float64)).all():
            raise AdapterError(
                f"{name} of the adapter {self.name}, multiplied by {scale:g}, is too large for {B.dtype.name}"
            )
        return product


def read_for_slots(
    path: Path,
    name: str,
    slots: Mapping[str, Slot],
    bundle: Path,
    fingerprint: str,
    device: str,
    context_length: int | None = None,
) -> LoadedAdapter:
    """Reads an ``.onnx_adapter`` file for the slots of a bundle's graph; everything about it is checked here.

    Args:
        path: the file.
        name: what the adapter is to go by.
        slots: of the graph.
        bundle: for messages.
        fingerprint: of the bundle's base model.
        device: ``"cpu"`` or ``"cuda"``.
        context_length: the most tokens that the model can see, a prefix included; None for no limit.

    Raises:
        AdapterError: no such file, a damaged one, one for another base model, tensors that the graph has no
            slots for or slots of another type or shape, or a prefix that is not whole or too long.
    """
    file = read_onnx_file(path)
    refuse_bank(file)
    if not slots:
        raise AdapterError(
            f"the graph of {bundle} has no slots for adapters, so it cannot take {path}",
            hint="export it with --adapters runtime",
        )
    expected = model_version(fingerprint)
    if file.model_version in UNKNOWN_BASE:
        warnings.warn(f"{path} does not say which base model it is for", stacklevel=4)
    elif file.model_version != expected:
        raise AdapterError(
            f"the adapter {path} is for another base model: its model_version is "
            f"{file.model_version:#x}, that of {bundle} is {expected:#x}",
            hint="convert it for this bundle's base: peft-deploy adapter convert … --to onnx --for BUNDLE",
        )
    # Whether the As of layers with one input stand side by side differs by graph; an adapter fits either way.
    own = in_types_of(slots, separate(file.tensors, str(path)))
    tensors = join(own, slots, str(path))
    check_slots(slots, tensors, bundle)
    check_prefix_tensors(tensors, slots, str(path), context_length)
    return LoadedAdapter(name, path, tensors, device)
