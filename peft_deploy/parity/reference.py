"""The dynamic-graph model as a reference: PaddleNLP's own forward, behind the runner interface.

Needs Paddle; imported by whoever needs it, never by the package.
"""

from __future__ import annotations

from peft_deploy.environment import available_memory, debugging, require_paddle

require_paddle("the reference side of a parity check")

import copy
import warnings
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import paddle
from paddle import nn

from peft_deploy.adapters.lora import LoRAModel
from peft_deploy.families import EncoderDecoderFamily, Family
from peft_deploy.parity.rounding import rounded_modules
from peft_deploy.runtime import check_feeds
from peft_deploy.runtime.runner import Array, Runner
from peft_deploy.signature import GraphSignature
from peft_deploy.trace.layer import evaluating
from peft_deploy.weights.cast import round_to
from peft_deploy.weights.source import DTYPES

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
        encoder: the encoder alone, of a model that is exported as two graphs.
    """

    def __init__(
        self,
        model: nn.Layer,
        family: Family,
        config: Mapping[str, Any],
        dtype: str = "float32",
        *,
        encoder: bool = False,
    ) -> None:
        self.model = model
        self.family = family
        self.config = config
        self.dtype = dtype
        self.encoder = encoder
        if encoder and isinstance(family, EncoderDecoderFamily):
            self._signature = family.encoder_signature(config, dtype)
        else:
            self._signature = family.whole_signature(config, dtype)

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
        wanted = self._signature.output_names if outputs is None else outputs
        return self._compute(feeds, wanted)

    def _compute(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        with undisturbed(self.model):
            tensors = {name: paddle.to_tensor(array) for name, array in feeds.items()}
            results = self.family.run_eagerly(self.model, tensors, self._signature)
        return {name: np.ascontiguousarray(results[name].numpy()) for name in outputs}

    def exact(self) -> PaddleReference | None:
        """The same model in float64; None when it would take more than :data:`MAX_EXACT_BYTES`, or
        than
        half of the memory that is free.
        """
        return self.in_float64() if self._fits_exactly() else None

    def in_float64(self) -> PaddleReference:
        """The same model in float64, however large it is."""
        twin = copy.deepcopy(self.model)
        twin._to_impl(dtype="float64", floating_only=True)  # to() casts tables of integers, too
        return PaddleReference(twin, self.family, self.config, "float64", encoder=self.encoder)

    def _fits_exactly(self) -> bool:
        size = 8 * sum(p.size for p in self.model.parameters())
        free = available_memory()
        return size <= MAX_EXACT_BYTES and (free is None or size <= free / 2)

    def without_adapters(self) -> PaddleReference | None:
        """The same model with its adapter inactive; None when it is not a LoRA model."""
        if not isinstance(self.model, LoRAModel):
            return None
        return _WithoutAdapter(
            self.model, self.family, self.config, self.dtype, encoder=self.encoder
        )

    def rounded(self, dtype: str, peaks: MutableMapping[str, float]) -> Runner:
        """The same model with what every module takes and gives rounded to a 16-bit type.

        Args:
            dtype: ``float16`` or ``bfloat16``.
            peaks: module → the largest magnitude so far; grows with every run.
        """
        return RoundedReference(self, self.model, dtype, peaks)


class RoundedReference:
    """See :meth:`PaddleReference.rounded`.

    Args:
        reference: is run.
        model: whose modules' results are rounded.
        dtype: to what.
        peaks: grows with every run.
    """

    def __init__(
        self,
        reference: PaddleReference,
        model: nn.Layer,
        dtype: str,
        peaks: MutableMapping[str, float],
    ) -> None:
        self._reference = reference
        self.model = model
        self._dtype = dtype
        self._peaks = peaks

    @property
    def signature(self) -> GraphSignature:
        """The reference's: numbers are rounded, and kept in its type."""
        return self._reference.signature

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """The reference's outputs, computed from rounded inputs by rounding modules."""
        rounded = {name: there_and_back(array, self._dtype) for name, array in feeds.items()}
        with rounded_modules(self.model, self._dtype, self._peaks):
            results = self._reference.run(rounded, outputs)
        return {name: there_and_back(array, self._dtype) for name, array in results.items()}


def there_and_back(array: Array, dtype: str) -> Array:
    """An array rounded to a 16-bit type, in its own type; one that is not of floating-point numbers as it is."""
    if array.dtype not in (np.float32, np.float64):
        return array
    return round_to(array, DTYPES[dtype]).astype(array.dtype)


class _WithoutAdapter(PaddleReference):
    """Switches the adapter off for the time of a call."""

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        with adapter_off(self.model):
            return super().run(feeds, outputs)


@contextmanager
def undisturbed(model: nn.Layer) -> Iterator[None]:
    """No gradients, no warnings, dropout off, and every layer's mode as it was afterwards.

    The flags are set directly: a LoRA model's own ``eval()`` may merge its weights.
    """
    with evaluating(model), paddle.no_grad(), warnings.catch_warnings():
        # Paddle deprecates what PaddleNLP calls; float64's lowest number overflows a cast.
        warnings.simplefilter("default" if debugging() else "ignore")
        yield


@contextmanager
def adapter_off(model: LoRAModel) -> Iterator[None]:
    """The adapter inactive, and merged again afterwards where it was."""
    merged = model.merged
    model.disable_lora()
    try:
        yield
    finally:
        model.enable_lora()
        if merged:
            model.merge()
