"""The dynamic-graph model as a reference: PaddleNLP's own forward, behind the runner interface.

Needs Paddle; imported by whoever needs it, never by the package.
"""

from __future__ import annotations

from peft_deploy.environment import debugging, require_paddle

require_paddle("the reference side of a parity check")

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn

from peft_deploy.adapters.lora import LoRAModel
from peft_deploy.errors import ExecutionError
from peft_deploy.families import DecoderFamily
from peft_deploy.runtime import check_feeds
from peft_deploy.runtime.runner import Array
from peft_deploy.signature import (
    ATTENTION_MASK,
    INPUT_IDS,
    LOGITS,
    POSITION_IDS,
    GraphSignature,
    present_names,
)

BUNDLE_LAYOUT = "BKSD"

# A float64 copy larger than this is not made: its arithmetic alone would take minutes.
MAX_EXACT_BYTES = 4 * 2**30


class PaddleReference:
    """A PaddleNLP model, with the bundle's names and cache layout.

    The model is left as it was: in its mode, with its weights, with its adapter as it is.

    Args:
        model: a ``…ForCausalLM``, or a LoRA model around one.
        family: its family.
        config: its config.json.
        dtype: of its parameters.
    """

    def __init__(
        self,
        model: nn.Layer,
        family: DecoderFamily,
        config: Mapping[str, Any],
        dtype: str = "float32",
    ) -> None:
        self.model = model
        self.family = family
        self.config = config
        self.dtype = dtype
        self._signature = family.signature(config, dtype)
        self._to_family = [BUNDLE_LAYOUT.index(axis) for axis in family.past_layout]
        self._to_bundle = [family.past_layout.index(axis) for axis in BUNDLE_LAYOUT]

    @property
    def signature(self) -> GraphSignature:
        """What the bundle has, in the model's own dtype."""
        return self._signature

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """The named outputs (all when None), from the model's own forward.

        Raises:
            ExecutionError: the inputs do not fit the signature, or the model returns something
                else.
        """
        check_feeds(self._signature, feeds)
        length, total = int(feeds[POSITION_IDS].max()) + 1, feeds[ATTENTION_MASK].shape[1]
        with (
            paddle.no_grad(),
            warnings.catch_warnings(),
            _evaluating(self.model),
            _table_up_to(self.model, length, total),
        ):
            # Paddle deprecates what PaddleNLP calls; float64's lowest number overflows a cast.
            warnings.simplefilter("default" if debugging() else "ignore")
            returned = self.model(
                input_ids=paddle.to_tensor(feeds[INPUT_IDS]),
                attention_mask=paddle.to_tensor(feeds[ATTENTION_MASK]),
                position_ids=paddle.to_tensor(feeds[POSITION_IDS]),
                past_key_values=self._past(feeds),
                use_cache=True,
                return_dict=False,
            )
        logits, caches = self._unpack(returned)
        results: dict[str, Array] = {LOGITS: logits.numpy()}
        flat = [tensor for cache in caches for tensor in cache]
        for name, tensor in zip(present_names(len(caches)), flat, strict=True):
            results[name] = np.ascontiguousarray(tensor.numpy().transpose(self._to_bundle))
        wanted = self._signature.output_names if outputs is None else outputs
        return {name: results[name] for name in wanted}

    def exact(self) -> PaddleReference | None:
        """The same model in float64; None when it would take more than :data:`MAX_EXACT_BYTES`, or
        than
        half of the memory that is free.
        """
        size = 8 * sum(p.size for p in self.model.parameters())
        free = _free_memory()
        if size > MAX_EXACT_BYTES or (free is not None and size > free / 2):
            return None
        twin = copy.deepcopy(self.model)
        twin.to(dtype="float64")
        return PaddleReference(twin, self.family, self.config, "float64")

    def without_adapters(self) -> PaddleReference | None:
        """The same model with its adapter inactive; None when it is not a LoRA model."""
        if not isinstance(self.model, LoRAModel):
            return None
        return _WithoutAdapter(self.model, self.family, self.config, self.dtype)

    def _past(self, feeds: Mapping[str, Array]) -> list[tuple[Any, Any]] | None:
        names = [spec.name for spec in self._signature.past]
        if feeds[names[0]].shape[2] == 0:
            return None  # PaddleNLP's mask code wants no cache rather than an empty one
        tensors = [
            paddle.to_tensor(np.ascontiguousarray(feeds[name].transpose(self._to_family)))
            for name in names
        ]
        return list(zip(tensors[::2], tensors[1::2], strict=True))

    def _unpack(self, returned: Any) -> tuple[paddle.Tensor, Sequence[Any]]:
        layers = self._signature.num_layers
        if not isinstance(returned, tuple) or len(returned) < 2 or len(returned[1]) != layers:
            raise ExecutionError(
                f"{type(self.model).__name__} does not return logits and the cache of "
                f"{layers} layers"
            )
        return returned[0], returned[1]


class _WithoutAdapter(PaddleReference):
    """Switches the adapter off for the time of a call."""

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        merged = self.model.merged
        self.model.disable_lora()
        try:
            return super().run(feeds, outputs)
        finally:
            self.model.enable_lora()
            if merged:
                self.model.merge()


def _free_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines)
    return 1024 * int(fields["MemAvailable"].split()[0]) if "MemAvailable" in fields else None


@contextmanager
def _evaluating(model: nn.Layer) -> Iterator[None]:
    """Dropout off, and every layer's mode as it was afterwards.

    The flags are set directly: a LoRA model's own ``eval()`` may merge its weights.
    """
    training = [layer for layer in model.sublayers(include_self=True) if layer.training]
    for layer in training:
        layer.training = False
    try:
        yield
    finally:
        for layer in training:
            layer.training = True


@contextmanager
def _table_up_to(model: nn.Layer, length: int, total: int) -> Iterator[None]:
    """Lets rotary layers hand out their table for ``length`` positions.

    PaddleNLP cuts the table at the number of tokens in mask and cache (``seq_len``), although it
    then looks positions up in it, so that a few tokens at high positions would read past its end.
    What is handed out here are the same layer's own numbers, only more of them.
    """
    changed: list[nn.Layer] = []
    if length > total:
        for layer in model.sublayers():
            is_leaf = next(layer.children(), None) is None
            if is_leaf and "seq_len" in inspect.signature(layer.forward).parameters:
                layer.forward = _longer(layer.forward, length)
                changed.append(layer)
    try:
        yield
    finally:
        for layer in changed:
            del layer.forward


def _longer(forward: Callable[..., Any], length: int) -> Callable[..., Any]:
    def call(x: paddle.Tensor, seq_len: int | None = None) -> Any:
        return forward(x, seq_len=seq_len if seq_len is None else max(seq_len, length))

    return call
