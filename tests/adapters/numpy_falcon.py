"""Falcon behind a prefix in NumPy, from its papers and the tensors of a PaddleNLP checkpoint alone.

One text at a time, no cache, float64. The prefix stands before the text in every layer: rotary positions (Su et al.
2021) do not turn it and start at 0 behind it, ALiBi (Press et al. 2022) counts it as tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Weights = Mapping[str, Array]


def falcon(
    weights: Weights, config: Any, ids: npt.NDArray[np.int64], prefix: Array, first: int = 0
) -> Array:
    """Logits [S, V].

    Args:
        weights: in float64, matrices [in, out], names without the first ``transformer.``.
        config: of the model.
        ids: [S].
        prefix: keys and values [L, 2, K, P, D].
        first: position of the first token.
    """
    x = weights["word_embeddings.weight"][ids]
    for i in range(config.n_layer):
        h = layer_norm(x, weights, f"h.{i}.input_layernorm")
        fused = linear(h, weights, f"h.{i}.self_attention.query_key_value")
        context = attend(*split(fused, config), prefix[i], config, first)
        out = linear(context, weights, f"h.{i}.self_attention.dense")
        x = x + out
        if not config.parallel_attn:
            h = layer_norm(x, weights, f"h.{i}.post_attention_layernorm")
        h = gelu(linear(h, weights, f"h.{i}.mlp.dense_h_to_4h"))
        x = x + linear(h, weights, f"h.{i}.mlp.dense_4h_to_h")
    return layer_norm(x, weights, "ln_f") @ weights["lm_head.weight"].T


def split(fused: Array, config: Any) -> tuple[Array, Array, Array]:
    """Query [H, S, D], key and value [K, S, D]; a single kv head comes behind the queries."""
    heads, size = config.n_head, config.hidden_size // config.n_head
    if config.multi_query:
        parts = fused.reshape(len(fused), heads + 2, size).transpose(1, 0, 2)
        return parts[:heads], parts[heads : heads + 1], parts[heads + 1 :]
    q, k, v = fused.reshape(len(fused), heads, 3, size).transpose(2, 1, 0, 3)
    return q, k, v


def attend(q: Array, k: Array, v: Array, prefix: Array, config: Any, first: int) -> Array:
    """[S, H * D]."""
    heads, length, size = q.shape
    behind = prefix.shape[2]
    bias: Array | float = 0.0
    if config.alibi:
        places = np.arange(behind + length)
        distances = places - places[behind:, None]  # [S, P + S], at most 0 where attended to
        bias = slopes(heads)[:, None, None] * distances
    else:
        q, k = rotate(q, first), rotate(k, first)
    keys, values = (np.concatenate(both, axis=1) for both in zip(prefix, (k, v), strict=True))
    scores = (q @ keys.transpose(0, 2, 1) + bias) / math.sqrt(size)
    seen = np.tri(length, behind + length, behind, dtype=bool)
    scores = np.where(seen, scores, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    return (shares @ values).transpose(1, 0, 2).reshape(length, -1)


def rotate(x: Array, first: int) -> Array:
    """[K, S, D], its halves turned against one another."""
    half = x.shape[-1] // 2
    angles = np.outer(np.arange(x.shape[1]) + first, 10000.0 ** (-np.arange(half) / half))
    a, b = x[..., :half], x[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def slopes(heads: int) -> Array:
    """[H] for a power of two, in bfloat16 as PaddleNLP has them."""
    exact = (2.0 ** (-8.0 / heads * np.arange(1, heads + 1))).astype(np.float32)
    bits = exact.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.astype(np.uint32).view(np.float32).astype(np.float64)


def layer_norm(x: Array, weights: Weights, name: str, epsilon: float = 1e-5) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: Array, weights: Weights, name: str) -> Array:
    return x @ weights[f"{name}.weight"] + weights.get(f"{name}.bias", np.zeros(1))


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
