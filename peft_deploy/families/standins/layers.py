"""Norms, projections and feed-forward blocks."""

from __future__ import annotations

import math

import paddle
from paddle import Tensor, nn
from paddle.nn import functional as F


def linear(layer: nn.Layer, x: Tensor) -> Tensor:
    """``x @ layer.weight + layer.bias`` for x [..., in].

    Not ``layer(x)``: calling a layer while tracing makes Paddle walk all operators traced so far.
    """
    y = paddle.matmul(x, layer.weight)
    return y if layer.bias is None else y + layer.bias


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root-mean-square norm over the last axis of x [..., E] (Zhang and Sennrich 2019, equation 4)."""
    return paddle.rsqrt((x * x).mean(-1, keepdim=True) + epsilon) * x * weight


def silu_gated(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``: what Paddle's ``swiglu`` computes, in operators that convert."""
    return F.silu(gate) * up


def layer_norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    """Layer norm over the last axis of x [..., E] (Ba et al. 2016) with the layer's weight, bias and epsilon."""
    return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, layer._epsilon)


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh form of GELU (Hendrycks and Gimpel 2016): Paddle's own is converted as if it were the erf form."""
    return 0.5 * x * (1.0 + paddle.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))))
