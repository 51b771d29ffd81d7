"""What all LoRA layers have in common: the scaling, and which weight stands in ``weight`` at the
moment.

The tensor in ``weight`` is one of three: the *original*, the *split* one that the LoRA branch is
added to (the original itself, except with PiSSA, where it is what PiSSA left of it), or the
*merged* one. The original is kept while anything else is in its place, so that coming back to it
is exact to the bit.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np
from paddle import nn

from peft_deploy.adapters.arrays import assign, to_array
from peft_deploy.adapters.pissa import principal_split
from peft_deploy.config import LoRAConfigError
from peft_deploy.errors import AdapterError
from peft_deploy.weights.lora import LoraPair, merge_weight
from peft_deploy.weights.source import Array

if TYPE_CHECKING:
    import paddle


class WeightState(Enum):
    """Which of the three tensors ``weight`` holds."""

    ORIGINAL = "original"
    SPLIT = "split"
    MERGED = "merged"


class LoRALayer:
    """The part of a LoRA layer that does not depend on what it computes; mixed into the Paddle
    layer.

    Attributes:
        r: rank R.
        lora_alpha: numerator of the scaling.
        scaling: the factor of the LoRA branch.
        lora_A: first matrix.
        lora_B: second matrix, zero at the start (but for PiSSA).
        lora_dropout: applied to the input of the LoRA branch only.
        pissa: whether A and B started as the weight's principal part.
        where: the layer's dotted name in its model, for messages.
    """

    weight: paddle.Tensor
    lora_A: paddle.Tensor  # noqa: N815 (the reference's name, and the key in its files)
    lora_B: paddle.Tensor  # noqa: N815
    r: int
    lora_alpha: float
    scaling: float
    pissa: bool
    training: bool
    where: str = "the weight"

    def _begin(
        self,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        *,
        rslora: bool = False,
        pissa: bool = False,
    ) -> None:
        """Sets everything but A and B; to be called when ``weight`` is there."""
        check_rank(r)
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = nn.Dropout(lora_dropout)
        self.scaling = 1.0 if pissa else lora_alpha / (math.sqrt(r) if rslora else r)
        self.pissa = False
        self.weight.stop_gradient = True
        self._state = WeightState.SPLIT
        self._disabled = False
        self._original: Array | None = None
        self._residual: Array | None = None
        self._written: int | None = None  # checksum of what was put into weight last

    def _start_from_principal_part(self) -> None:
        """PiSSA's initialization, of A, B and the weight; to be called when A and B are there."""
        original = to_array(self.weight)
        split = principal_split(original, self.r)
        assign(self.lora_A, split.A)
        assign(self.lora_B, split.B)
        self.pissa = True
        self._original = original
        self._put(split.residual)

    @property
    def merged(self) -> bool:
        """Whether ``weight`` holds the sum of the original weight and the LoRA branch."""
        return self._state is WeightState.MERGED

    @contextmanager
    def branch_left_out(self) -> Iterator[None]:
        """The forward without the LoRA branch, whatever is in ``weight``: for tracing, not for computing."""
        before, self._disabled = self._disabled, True
        try:
            yield
        finally:
            self._disabled = before

    @property
    def disable_lora(self) -> bool:
        """Whether the layer computes what it computed before LoRA, whatever else was called."""
        return self._disabled

    @disable_lora.setter
    def disable_lora(self, value: bool) -> None:
        if value == self._disabled:
            return
        if value:
            self._show(WeightState.ORIGINAL)
        else:
            self._show(WeightState.SPLIT)
        self._disabled = bool(value)

    def merge(self) -> None:
        """Adds the LoRA branch to the weight; a second call does nothing.

        Raises:
            AdapterError: LoRA is disabled, or the sum is not finite in the weight's type.
        """
        if self._disabled:
            raise AdapterError(
                "a disabled LoRA layer cannot be merged: it would change what the model computes",
                hint="call enable_lora() first",
            )
        self._show(WeightState.MERGED)

    def unmerge(self) -> None:
        """Puts the weight back that was there before :meth:`merge`, exact to the bit."""
        if self.merged:
            self._show(WeightState.SPLIT)

    def detach(self) -> None:
        """Puts the original weight back for good or until :meth:`attach`; ends merging too."""
        self._show(WeightState.ORIGINAL)

    def attach(self) -> None:
        """Makes the layer ready to compute after :meth:`detach`."""
        if not self._disabled:
            self._show(WeightState.SPLIT)

    def original_weight(self) -> Array:
        """The weight as it was before LoRA, in its own type, whatever the layer's state."""
        if self._original is not None:
            return self._original
        return to_array(self.weight)

    def split_weight(self) -> Array:
        """The weight that the LoRA branch is added to, in its own type, whatever the layer's
        state.
        """
        if self._holds_split():
            return to_array(self.weight)
        kept = self._residual if self.pissa else self._original
        assert kept is not None
        return kept

    def merged_weight(self) -> Array:
        """The weight with the LoRA branch added, in its own type, whatever the layer's state.

        Raises:
            AdapterError: the sum is not finite in the weight's type.
        """
        return self._merge_into(self.split_weight())

    def load_split_weight(self, values: Array) -> None:
        """Puts another weight in place of the one that the LoRA branch is added to; not while
        merged.
        """
        if self.pissa:
            # The original moves along, so that it stays what A and B were split from.
            old = self.split_weight()
            kept = self.original_weight()
            moved = values.astype(np.float32) + (kept.astype(np.float32) - old.astype(np.float32))
            self._original = moved.astype(kept.dtype)
            self._residual = values.astype(kept.dtype)
            self._put(self._original if self._state is WeightState.ORIGINAL else values)
        else:
            assign(self.weight, values)

    def get_delta_weight(self) -> paddle.Tensor:
        """What merging adds to the weight, in the shape of the weight."""
        raise NotImplementedError

    def _pair(self) -> LoraPair:
        """A and B such that ``scaling · A @ B`` is the change of the weight seen as a matrix."""
        raise NotImplementedError

    def as_matrix(self, weight: Array) -> Array:
        """The weight in the two dimensions of :meth:`_pair`'s product."""
        return weight

    def _show(self, wanted: WeightState) -> None:
        """Puts the wanted one of the three tensors into ``weight``, or changes nothing."""
        if not self.pissa and WeightState.MERGED not in (wanted, self._state):
            self._state = wanted  # original and split are the same tensor
        if wanted is self._state:
            return
        current = to_array(self.weight)
        values = self._values_for(wanted, current)
        if self._holds_split():
            if self.pissa:
                self._check_untouched(current)
                self._residual = current
            else:
                self._original = current
        else:
            self._check_untouched(current)
        self._put(values)
        self._state = wanted
        if not self.pissa and wanted is not WeightState.MERGED:
            self._original = self._written = None

    def _holds_split(self) -> bool:
        if self._state is WeightState.ORIGINAL:
            return not self.pissa
        return self._state is WeightState.SPLIT

    def _values_for(self, wanted: WeightState, current: Array) -> Array:
        if wanted is WeightState.MERGED:
            return self._merge_into(current if self._holds_split() else self.split_weight())
        kept = self._residual if wanted is WeightState.SPLIT and self.pissa else self._original
        assert kept is not None  # whatever leaves weight for these states is kept in _show
        return kept

    def _check_untouched(self, current: Array) -> None:
        kept = self._original
        cast = kept is not None and kept.dtype != current.dtype  # the model's type was changed
        if not cast and self._written is not None and self._written != _checksum(current):
            raise AdapterError(
                f"{self.where} was changed from outside while it was {self._state.value}; "
                "what it was before cannot be told any more",
                hint="load weights before merging, or call unmerge() first",
            )

    def _put(self, values: Array) -> None:
        assign(self.weight, values)
        self._written = _checksum(to_array(self.weight))

    def _merge_into(self, base: Array) -> Array:
        matrix = self.as_matrix(base)
        return merge_weight(matrix, self._pair(), name=self.where).reshape(base.shape)


def check_rank(r: Any) -> None:
    """Refuses a rank that is not a positive integer.

    Raises:
        LoRAConfigError: also a ValueError.
    """
    if isinstance(r, bool) or not isinstance(r, int) or r <= 0:
        raise LoRAConfigError(f"Lora rank r should be a positive integer, not {r!r}")


def _checksum(values: Array) -> int:
    return zlib.adler32(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
