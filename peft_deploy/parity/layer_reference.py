"""Any layer as a reference: its own forward, behind the runner interface. Needs Paddle."""

from __future__ import annotations

from peft_deploy.environment import require_paddle

require_paddle("the reference side of a parity check")

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import paddle
from paddle import nn

from peft_deploy.adapters.lora import LoRAModel
from peft_deploy.config.layer_signature import LayerSignature
from peft_deploy.errors import ExecutionError, PeftDeployError
from peft_deploy.parity.reference import MAX_EXACT_BYTES, adapter_off, undisturbed
from peft_deploy.runtime import check_feeds
from peft_deploy.runtime.runner import Array
from peft_deploy.signature import GraphSignature
from peft_deploy.trace.layer import call_layer, takes_names


class LayerReference:
    """A layer, or a LoRA model around one; left as it was.

    Args:
        layer: what to call.
        layer_signature: how to call it.
        signature: of the graph; outputs it need not have right.
        dtype: of the layer's weights.
    """

    def __init__(
        self,
        layer: nn.Layer,
        layer_signature: LayerSignature,
        signature: GraphSignature,
        dtype: str = "float32",
    ) -> None:
        self._layer = layer
        self._layer_signature = layer_signature
        self._named = takes_names(layer, layer_signature)
        inputs = (replace(s, dtype=dtype) if s.dtype == "float32" else s for s in signature.inputs)
        self._signature = GraphSignature(tuple(inputs), signature.outputs)

    @property
    def signature(self) -> GraphSignature:
        """What the bundle has, floating-point inputs in the layer's own type."""
        return self._signature

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """The named outputs (all when None), from the layer's own forward.

        Raises:
            ExecutionError: the inputs do not fit the signature, or the layer does not take them.
        """
        check_feeds(self._signature, feeds)
        names = self._layer_signature.outputs
        with undisturbed(self._layer):
            inputs = [paddle.to_tensor(feeds[name]) for name in self._signature.input_names]
            try:
                results = call_layer(self._layer, inputs, self._layer_signature, self._named)
                arrays = [np.ascontiguousarray(result.numpy()) for result in results]
            except PeftDeployError:
                raise
            except Exception as exc:  # the layer's own code may raise anything
                shapes = ", ".join(f"{n} {list(a.shape)}" for n, a in feeds.items())
                lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
                telling = [line for line in lines if "Error:" in line] or lines[-1:]
                raise ExecutionError(
                    f"{type(self._layer).__name__} does not take {shapes}: "
                    f"{type(exc).__name__}: {telling[-1] if telling else ''}",
                    hint="the signature's sizes say what to try, its ranges which numbers",
                ) from exc
        known = dict(zip(names, arrays, strict=True))
        return {name: known[name] for name in (names if outputs is None else outputs)}

    def exact(self) -> LayerReference | None:
        """The same layer in float64; None when it cannot be copied or would be too large."""
        if 8 * sum(p.size for p in self._layer.parameters()) > MAX_EXACT_BYTES:
            return None
        try:
            twin = copy.deepcopy(self._layer)
        except Exception:  # what a layer keeps need not be copyable
            return None
        twin.to(dtype="float64")
        return LayerReference(twin, self._layer_signature, self._signature, "float64")

    def without_adapters(self) -> LayerReference | None:
        """The same layer with its adapter inactive; None when it is no LoRA model."""
        if not isinstance(self._layer, LoRAModel):
            return None
        return _Plain(self._layer, self._layer_signature, self._signature)


class _Plain(LayerReference):
    """Switches the adapter off for the time of a call."""

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        with adapter_off(self._layer):
            return super().run(feeds, outputs)
