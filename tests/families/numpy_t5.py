"""T5 in NumPy, from its paper and the tensors of Hugging Face's checkpoints alone.

One pair of texts at a time, no cache, float64. Weights go by Hugging Face's names, in torch's layout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Weights = Mapping[str, Array]
Ids = npt.NDArray[np.int64]
MAX_DISTANCE = 128
_EDGE = 1e-6  # how far float32 may push a distance over the edge of its bucket


def bucket(distance: int, count: int, *, both_ways: bool) -> int:
    """Of the key's place minus the query's: half of the buckets one distance each, the rest in geometric steps."""
    base = 0
    if both_ways:
        count //= 2
        base, distance = (count if distance > 0 else 0), abs(distance)
    else:
        distance = max(-distance, 0)
    exact = count // 2
    if distance < exact:
        return base + distance
    step = math.log(distance / exact) / math.log(MAX_DISTANCE / exact) * (count - exact)
    return base + min(count - 1, exact + math.floor(step + _EDGE))


def position_bias(table: Array, queries: int, keys: int, *, both_ways: bool) -> Array:
    """[H, S, T] from the table [buckets, H]."""
    rows = [
        [table[bucket(k - q, len(table), both_ways=both_ways)] for k in range(keys)]
        for q in range(queries)
    ]
    return np.array(rows).transpose(2, 0, 1)


def rms_norm(x: Array, weights: Weights, name: str, epsilon: float) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * weights[f"{name}.weight"]


def attend(
    x: Array, source: Array, weights: Weights, name: str, heads: int, bias: Array | float
) -> Array:
    q, k, v = (
        (y @ weights[f"{name}.{part}.weight"].T).reshape(len(y), heads, -1)
        for part, y in (("q", x), ("k", source), ("v", source))
    )
    scores = np.einsum("shd,thd->hst", q, k) + bias
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    out = np.einsum("hst,thd->shd", shares, v).reshape(len(x), -1)
    return out @ weights[f"{name}.o.weight"].T


def feed_forward(x: Array, weights: Weights, name: str, kind: str) -> Array:
    def linear(y: Array, part: str) -> Array:
        return y @ weights[f"{name}.{part}.weight"].T

    if kind == "relu":
        return linear(np.maximum(linear(x, "wi"), 0), "wo")
    gate = linear(x, "wi_0")
    if kind == "gated-gelu":
        inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
        gate = 0.5 * gate * (1 + np.tanh(inner))
    else:
        gate = gate / (1 + np.exp(-gate))
    return linear(gate * linear(x, "wi_1"), "wo")


def stack(
    ids: Ids, weights: Weights, config: Mapping[str, Any], half: str, source: Array | None
) -> Array:
    """Hidden states [S, E] of the encoder, or behind a source [M, E] those of the decoder."""
    decodes, n = source is not None, len(ids)
    epsilon, heads = config["layer_norm_epsilon"], config["num_heads"]
    table = weights[f"{half}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    bias = position_bias(table, n, n, both_ways=not decodes)
    if decodes:
        bias = np.where(np.tri(n, dtype=bool), bias, -np.inf)
    x = weights["shared.weight"][ids]
    for i in range(config["num_decoder_layers" if decodes else "num_layers"]):
        layer = f"{half}.block.{i}.layer."
        h = rms_norm(x, weights, f"{layer}0.layer_norm", epsilon)
        x = x + attend(h, h, weights, f"{layer}0.SelfAttention", heads, bias)
        last = 1
        if source is not None:
            last = 2
            h = rms_norm(x, weights, f"{layer}1.layer_norm", epsilon)
            x = x + attend(h, source, weights, f"{layer}1.EncDecAttention", heads, 0.0)
        h = rms_norm(x, weights, f"{layer}{last}.layer_norm", epsilon)
        kind = config["feed_forward_proj"]
        x = x + feed_forward(h, weights, f"{layer}{last}.DenseReluDense", kind)
    return rms_norm(x, weights, f"{half}.final_layer_norm", epsilon)


def t5(weights: Weights, config: Mapping[str, Any], source: Ids, ids: Ids) -> Array:
    """Logits [S, V] of the tokens ids behind a source text."""
    read = stack(source, weights, config, "encoder", None)
    x = stack(ids, weights, config, "decoder", read)
    if config["tie_word_embeddings"]:
        return x * config["d_model"] ** -0.5 @ weights["shared.weight"].T
    return x @ weights["lm_head.weight"].T
