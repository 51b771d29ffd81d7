"""Attention with an explicit mask and an explicit cache."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import paddle
from paddle import Tensor
from paddle.nn import functional as F

# What is added to a masked score: half of float32's lowest number, which PaddleNLP adds. Either absorbs the score, so
# that rows that may attend to nothing (padding) get the plain average of all values, as in the reference. But the
# lowest number itself is a sign to onnxruntime's Attention: it gives zeros for such rows. Half of it cannot become
# -inf either where something is added to a mask.
MASKED = float(paddle.finfo(paddle.float32).min) / 2


def causal_bias(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """0 where a token may attend, :data:`MASKED` where not: [B, 1, S, T].

    The S new tokens are the last of the T that attention_mask [B, T] covers, whatever the past holds (a cache, a
    prefix); so token s attends to index t if t ≤ s + (T - S) and its mask is not 0.
    """
    S = paddle.shape(input_ids)[1].cast("int64")
    T = paddle.shape(attention_mask)[1].cast("int64")
    rows = (paddle.arange(0, S, dtype="int64") + (T - S)).unsqueeze(-1)  # [S, 1]
    causal = paddle.arange(0, T, dtype="int64").unsqueeze(0) <= rows  # [S, T]
    real = attention_mask.cast("bool").unsqueeze([1, 2])  # [B, 1, 1, T]
    keep = paddle.logical_and(causal, real).cast("float32")
    # 0 * x = 0 and -1 * x = -x exactly; `where` with two constants converts to thirty nodes.
    return (keep - 1.0) * -MASKED


def split_heads(x: Tensor, heads: int, head_dim: int) -> Tensor:
    """[B, S, heads * D] → [B, heads, S, D]."""
    return x.reshape([0, 0, heads, head_dim]).transpose([0, 2, 1, 3])


def split_fused_heads(x: Tensor, heads: int, head_dim: int) -> list[Tensor]:
    """Query, key and value, [B, H, S, D] each, of a projection [B, S, H * 3 * D] that has them side by side in
    every head.
    """
    parts: list[Tensor] = split_heads(x, heads, 3 * head_dim).split(3, axis=-1)
    return parts


def alibi_slopes(heads: int) -> npt.NDArray[np.float32]:
    """The slopes of ALiBi (Press et al. 2022), [H]: powers of 2^(-8/n) for n heads, n a power of two.

    Other numbers of heads take the slopes of the next smaller power of two, and fill up with every other one of
    the next larger, as in the paper's code.
    """
    n = 2 ** math.floor(math.log2(heads))
    # Models were trained with powers of the rounded ratio, not with the rounded powers.
    ratio, finer = float(np.float32(2.0 ** (-8 / n))), float(np.float32(2.0 ** (-4 / n)))
    slopes = [ratio ** (i + 1) for i in range(n)]
    slopes += [finer ** (2 * i + 1) for i in range(heads - n)]
    return np.array(slopes, np.float32)


def alibi_bias(attention_mask: Tensor, slopes: npt.NDArray[np.float32]) -> Tensor:
    """What ALiBi adds to the scores, [B, H, 1, T]: the slope times the place of the key among real tokens.

    Softmax takes away whatever is the same for all keys of a query, so this is the same as minus the slope times
    the distance. Padding, whichever side it is on, is not counted.
    """
    places = attention_mask.cumsum(-1).cast("float32") - 1.0  # [B, T]
    slope = paddle.to_tensor(slopes).reshape([-1, 1, 1])
    return places.unsqueeze([1, 2]) * slope


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, past: list[Tensor], bias: Tensor, *, scale: float
) -> tuple[Tensor, list[Tensor]]:
    """:func:`grouped_attention` to the past and to the new tokens.

    Args:
        q: [B, H, S, D].
        k: of the new tokens, [B, K, S, D].
        v: likewise.
        past: keys and values of the tokens before, [B, K, P, D].
        bias: as there.
        scale: as there.

    Returns:
        [B, S, H * D], and the keys and values of all tokens, [B, K, T, D].
    """
    k = paddle.concat([past[0], k], 2)
    v = paddle.concat([past[1], v], 2)
    return grouped_attention(q, k, v, bias, scale=scale), [k, v]


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, scale: float) -> Tensor:
    """Scaled dot-product attention with grouped heads (Ainslie et al. 2023).

    Args:
        q: [B, H, S, D].
        k: [B, K, T, D]; K divides H, and head h uses kv head h // (H/K).
        v: [B, K, T, D].
        bias: [B, 1, S, T], added to the scores; [B, H, S, T] where H = K or K = 1.
        scale: factor of the scores.

    Returns:
        [B, S, H * D].
    """
    H, K, D = q.shape[1], k.shape[1], q.shape[3]
    if H != K:
        # k and v are broadcast over the group, not repeated: no copy of the cache.
        q = q.reshape([0, K, H // K, -1, D])  # [B, K, G, S, D]
        k, v, bias = k.unsqueeze(2), v.unsqueeze(2), bias.unsqueeze(1)
    scores = paddle.matmul(q * scale, k, transpose_y=True) + bias
    out = paddle.matmul(F.softmax(scores, -1), v)
    if H != K:
        out = out.reshape([0, H, -1, D])
    return out.transpose([0, 2, 1, 3]).reshape([0, 0, H * D])
