"""LoRAMergedLinear: LoRA on some of the projections that one weight holds, interleaved head by
head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import paddle
from paddle import nn
from paddle.nn import functional

from peft_deploy.adapters.arrays import to_array
from peft_deploy.adapters.formats.fused import spread_parts
from peft_deploy.adapters.lora.layer import LoRALayer, check_rank
from peft_deploy.adapters.lora.linear import add_branch, adopt, kaiming_uniform, zeros
from peft_deploy.config import LoRAConfigError, LoRAConfigTypeError
from peft_deploy.weights.lora import LoraPair


class FusedLayer(LoRALayer):
    """A LoRA layer on a fused projection; see :class:`LoRAMergedLinear` for the shapes."""

    create_parameter: Any
    head_dim: int
    head_num: int
    enable_lora: list[bool]
    merge_weights: bool

    def _create_branch(
        self,
        head_dim: int,
        enable_lora: Sequence[bool],
        merge_weights: bool,
        lora_plus_scale: float,
        dtype: str,
        attr: paddle.ParamAttr | None = None,
    ) -> None:
        self.in_features, self.out_features = self.weight.shape
        self.head_dim = head_dim
        self.enable_lora = list(enable_lora)
        self.merge_weights = merge_weights
        self.head_num = self.out_features // (len(self.enable_lora) * head_dim)
        n = sum(self.enable_lora)
        self.lora_A = self.create_parameter(
            [self.in_features, self.r * n],
            dtype=dtype,
            attr=attr or paddle.ParamAttr(initializer=kaiming_uniform()),
        )
        self.lora_B = self.create_parameter(
            [self.r, self.head_num * n * head_dim], dtype=dtype, attr=zeros(lora_plus_scale)
        )

    def get_delta_weight(self) -> paddle.Tensor:
        """What merging adds to the weight [in, H · parts · D], in the type of A."""
        wide = "float64" if self.lora_A.dtype == paddle.float64 else "float32"
        delta = self.project(self.lora_A.astype(wide), self.lora_B.astype(wide))
        return (delta * self.scaling).astype(self.lora_A.dtype)

    def reduce(self, input: paddle.Tensor) -> paddle.Tensor:
        """``scaling · dropout(x) @ A``, in the type of A: [..., in] → [..., n · R]."""
        x = self.lora_dropout(input)
        if x.dtype != self.lora_A.dtype:
            x = x.astype(self.lora_A.dtype)
        return x @ self.lora_A * self.scaling

    def project(self, h: paddle.Tensor, B: paddle.Tensor) -> paddle.Tensor:
        """Each block of R columns of h [..., n · R] through its part of B, laid out like the
        weight.
        """
        lead = h.shape[:-1]
        heads = [*lead, self.head_num, 1, self.head_dim]
        by_head = B.reshape([self.r, self.head_num, -1, self.head_dim])  # [R, H, n, D]
        blocks = paddle.split(h, sum(self.enable_lora), axis=-1)  # n of [..., R]
        parts, k = [], 0
        for enabled in self.enable_lora:
            if enabled:
                part = blocks[k] @ by_head[:, :, k].reshape([self.r, -1])  # [..., H · D]
                parts.append(part.reshape(heads))
                k += 1
            else:
                parts.append(paddle.zeros(heads, h.dtype))
        return paddle.concat(parts, axis=-2).reshape([*lead, self.out_features])

    def _pair(self) -> LoraPair:
        B = spread_parts(to_array(self.lora_B), self.enable_lora, self.head_dim)
        return LoraPair(to_array(self.lora_A), B, self.scaling)


class LoRAMergedLinear(FusedLayer, nn.Linear):  # type: ignore[misc]
    """A fused projection (as query, key and value in GPT, Bloom and ChatGLM) of which some parts
    get LoRA.

    The weight's columns are laid out head by head, each head holding its parts side by side: [in,
    H · parts · D]. With n adapted parts, A is [in, n · R], one block of columns for each, and B is
    [R, H · n · D], laid out like the weight. Scaling is alpha / R.

    Args:
        in_features: size of the last axis of the input.
        out_features: H · parts · D.
        head_dim: D.
        r: rank R of each adapted part.
        lora_alpha: numerator of the scaling.
        lora_dropout: probability of zeroing an input of the branch while training.
        merge_weights: ``eval()`` of this layer merges, ``train()`` unmerges.
        enable_lora: for each part, whether it gets LoRA; at least one has to.
        linear_kwargs: what ``paddle.nn.Linear`` takes.

    Raises:
        LoRAConfigError: no part is adapted, the output is no whole number of heads, or a rank that
            is not positive.
        LoRAConfigTypeError: ``enable_lora`` is not a list of booleans; also a TypeError.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        head_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        enable_lora: Sequence[bool] = (False,),
        **linear_kwargs: Any,
    ) -> None:
        check_rank(r)
        check_parts(out_features, head_dim, enable_lora)
        nn.Linear.__init__(self, in_features, out_features, **linear_kwargs)
        self._begin(r, lora_alpha, lora_dropout)
        self._create_branch(head_dim, enable_lora, merge_weights, 1.0, self._dtype)

    @classmethod
    def wrap(
        cls,
        linear: nn.Linear,
        *,
        head_dim: int,
        enable_lora: Sequence[bool],
        r: int,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        lora_plus_scale: float = 1.0,
        dtype: str | None = None,
    ) -> LoRAMergedLinear:
        """A LoRA layer that shares the weight and bias of an existing layer; see the class for the
        arguments.
        """
        check_parts(linear.weight.shape[1], head_dim, enable_lora)
        layer = cls.__new__(cls)
        adopt(layer, linear)
        layer._begin(r, lora_alpha, lora_dropout)
        layer._create_branch(
            head_dim, enable_lora, False, lora_plus_scale, dtype or paddle.get_default_dtype()
        )
        return layer

    def forward(self, input: paddle.Tensor) -> paddle.Tensor:
        """[..., in] → [..., out]."""
        result = functional.linear(input, self.weight, self.bias, self.name)
        if self.disable_lora or self.merged:
            return result
        return add_branch(result, self.project(self.reduce(input), self.lora_B))

    def train(self, mode: bool = True) -> LoRAMergedLinear:
        """Training mode; unmerges when the layer was made with ``merge_weights``."""
        super().train(mode)
        if mode and self.merge_weights:
            self.unmerge()
        return self

    def eval(self) -> LoRAMergedLinear:
        """Evaluation mode; merges when the layer was made with ``merge_weights``."""
        super().eval()
        if self.merge_weights and not self.disable_lora:
            self.merge()
        return self

    def extra_repr(self) -> str:
        """What ``print(layer)`` shows between the brackets."""
        name = f", name={self.name}" if self.name else ""
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, rank={self.r}{name}"


def check_parts(out_features: int, head_dim: int, enable_lora: Sequence[bool]) -> None:
    """Refuses parts that are no list of booleans, or that do not divide the output.

    Raises:
        LoRAConfigError: nothing is adapted, or the output is no whole number of heads.
        LoRAConfigTypeError: not a list of booleans.
    """
    is_list = isinstance(enable_lora, (list, tuple)) and len(enable_lora) > 0
    if not is_list or not all(isinstance(part, bool) for part in enable_lora):
        raise LoRAConfigTypeError(f"enable_lora must be a list of bools, not {enable_lora!r}")
    if not any(enable_lora):
        raise LoRAConfigError("enable_lora adapts no part at all; use the plain linear layer then")
    if out_features % (len(enable_lora) * head_dim):
        raise LoRAConfigError(
            f"{out_features} output features are no whole number of heads with "
            f"{len(enable_lora)} parts of head_dim {head_dim}"
        )
