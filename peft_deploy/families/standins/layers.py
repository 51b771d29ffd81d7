"""Norms, projections and feed-forward blocks."""

from __future__ import annotations

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
