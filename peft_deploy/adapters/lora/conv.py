"""LoRAConv2D: a convolution with a low-rank branch of two convolutions beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional

from peft_deploy.adapters.arrays import to_array
from peft_deploy.adapters.lora.layer import LoRALayer, check_rank
from peft_deploy.adapters.lora.linear import add_branch, adopt, kaiming_uniform, zeros
from peft_deploy.weights.lora import LoraPair
from peft_deploy.weights.source import Array


class LoRAConv2D(LoRALayer, nn.Conv2D):  # type: ignore[misc]
    """``y = conv(x, W) + b + scaling · conv1x1(conv(dropout(x), A), B)``.

    A [R, in / groups, k, k] has the stride, padding and dilation of the layer, B is [out, R, 1,
    1]. With groups, every group's input goes through the same A, so that the change of the weight,
    seen as a matrix [out, in / groups · k · k], is B · A whatever the groups. Scaling is alpha /
    R; weight and bias are frozen.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: of the layer and of A.
        r: rank R.
        lora_alpha: numerator of the scaling.
        lora_dropout: probability of zeroing an input of the branch while training.
        conv_kwargs: what ``paddle.nn.Conv2D`` takes.

    Raises:
        LoRAConfigError: the rank is not a positive integer.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | list[int] | tuple[int, int],
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        **conv_kwargs: Any,
    ) -> None:
        check_rank(r)
        nn.Conv2D.__init__(self, in_channels, out_channels, kernel_size, **conv_kwargs)
        self._begin(r, lora_alpha, lora_dropout)
        self._create_branch(1.0, self._dtype)

    @classmethod
    def wrap(
        cls,
        conv: nn.Conv2D,
        *,
        r: int,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        lora_plus_scale: float = 1.0,
        dtype: str | None = None,
    ) -> LoRAConv2D:
        """A LoRA layer that shares the weight and bias of an existing layer; see the class for the
        arguments.
        """
        layer = cls.__new__(cls)
        adopt(layer, conv)
        layer._begin(r, lora_alpha, lora_dropout)
        layer._create_branch(lora_plus_scale, dtype or paddle.get_default_dtype())
        return layer

    def _create_branch(self, lora_plus_scale: float, dtype: str) -> None:
        outputs, inputs, *kernel = self.weight.shape
        self.lora_A = self.create_parameter(
            [self.r, inputs, *kernel], dtype=dtype, default_initializer=kaiming_uniform()
        )
        self.lora_B = self.create_parameter(
            [outputs, self.r, 1, 1], dtype=dtype, attr=zeros(lora_plus_scale)
        )
        if self.bias is not None:
            self.bias.stop_gradient = True

    def get_delta_weight(self) -> paddle.Tensor:
        """``scaling · B · A`` in the shape of the weight and the type of A."""
        wide = "float64" if self.lora_A.dtype == paddle.float64 else "float32"
        A = self.lora_A.astype(wide).reshape([self.r, -1])  # [R, in · k · k]
        B = self.lora_B.astype(wide).reshape([-1, self.r])  # [out, R]
        return (B @ A * self.scaling).reshape(self.weight.shape).astype(self.lora_A.dtype)

    def forward(self, input: paddle.Tensor, *args: Any, **kwargs: Any) -> paddle.Tensor:
        """[B, in, height, width] → [B, out, …], or channels last as the layer's ``data_format``
        says.
        """
        result = nn.Conv2D.forward(self, input)
        if self.disable_lora or self.merged:
            return result
        x = self.lora_dropout(input)
        if x.dtype != self.lora_A.dtype:
            x = x.astype(self.lora_A.dtype)
        return add_branch(result, self._branch(x))

    def _branch(self, x: paddle.Tensor) -> paddle.Tensor:
        padding = self._padding
        if self._padding_mode != "zeros":
            x = functional.pad(
                x,
                self._reversed_padding_repeated_twice,
                mode=self._padding_mode,
                data_format=self._data_format,
            )
            padding = 0
        groups, layout = self._groups, self._data_format
        A = paddle.tile(self.lora_A, [groups, 1, 1, 1]) if groups > 1 else self.lora_A
        h = functional.conv2d(
            x, A, None, self._stride, padding, self._dilation, groups, data_format=layout
        )  # [B, groups · R, …]
        return functional.conv2d(h * self.scaling, self.lora_B, groups=groups, data_format=layout)

    def _pair(self) -> LoraPair:
        A, B = to_array(self.lora_A), to_array(self.lora_B)
        return LoraPair(B.reshape(B.shape[0], self.r), A.reshape(self.r, -1), self.scaling)

    def as_matrix(self, weight: Array) -> Array:
        """[out, in / groups · k · k]."""
        return np.ascontiguousarray(weight).reshape(weight.shape[0], -1)

    def extra_repr(self) -> str:
        """What ``print(layer)`` shows between the brackets."""
        return f"{nn.Conv2D.extra_repr(self)}, rank={self.r}, alpha={self.lora_alpha}"
