"""GPT-2, OPT and BLOOM in NumPy, from their papers and the tensors of Hugging Face's checkpoints alone.

One text at a time, no cache, float64. Weights go by Hugging Face's names, in torch's layout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Weights = Mapping[str, Array]


def layer_norm(x: Array, weights: Weights, name: str, epsilon: float = 1e-5) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: Array, weights: Weights, name: str) -> Array:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", np.zeros(1))


def conv1d(x: Array, weights: Weights, name: str) -> Array:
    return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attend(q: Array, k: Array, v: Array, bias: Array | float = 0.0) -> Array:
    """[S, H, D] each → [S, H * D]; ``bias`` is added to the scores [H, S, S]."""
    scores = np.einsum("shd,thd->hst", q, k) / math.sqrt(q.shape[-1]) + bias
    scores = np.where(np.tri(len(q), dtype=bool), scores, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    return np.einsum("hst,thd->shd", shares, v).reshape(len(q), -1)


def gpt2(weights: Weights, config: Mapping[str, Any], ids: npt.NDArray[np.int64]) -> Array:
    root, heads = "transformer.", config["n_head"]
    x = weights[f"{root}wte.weight"][ids] + weights[f"{root}wpe.weight"][: len(ids)]
    for i in range(config["n_layer"]):
        layer = f"{root}h.{i}."
        fused = conv1d(layer_norm(x, weights, f"{layer}ln_1"), weights, f"{layer}attn.c_attn")
        q, k, v = (part.reshape(len(ids), heads, -1) for part in np.split(fused, 3, axis=-1))
        x = x + conv1d(attend(q, k, v), weights, f"{layer}attn.c_proj")
        h = conv1d(layer_norm(x, weights, f"{layer}ln_2"), weights, f"{layer}mlp.c_fc")
        x = x + conv1d(gelu_tanh(h), weights, f"{layer}mlp.c_proj")
    return layer_norm(x, weights, f"{root}ln_f") @ weights[f"{root}wte.weight"].T


def opt(weights: Weights, config: Mapping[str, Any], ids: npt.NDArray[np.int64]) -> Array:
    root, heads = "model.decoder.", config["num_attention_heads"]
    before = config["do_layer_norm_before"]
    act = {"relu": lambda x: np.maximum(x, 0), "gelu_new": gelu_tanh}[
        config["activation_function"]
    ]
    embedding = weights[f"{root}embed_tokens.weight"]
    projected = config["word_embed_proj_dim"] != config["hidden_size"]
    x = embedding[ids]
    x = linear(x, weights, f"{root}project_in") if projected else x
    x = x + weights[f"{root}embed_positions.weight"][2 : len(ids) + 2]

    def norm(x: Array, name: str, here: bool) -> Array:
        return layer_norm(x, weights, name) if here else x

    for i in range(config["num_hidden_layers"]):
        layer = f"{root}layers.{i}."
        h = norm(x, f"{layer}self_attn_layer_norm", before)
        q, k, v = (
            linear(h, weights, f"{layer}self_attn.{part}_proj").reshape(len(ids), heads, -1)
            for part in "qkv"
        )
        x = x + linear(attend(q, k, v), weights, f"{layer}self_attn.out_proj")
        x = norm(x, f"{layer}self_attn_layer_norm", not before)
        h = norm(x, f"{layer}final_layer_norm", before)
        x = x + linear(act(linear(h, weights, f"{layer}fc1")), weights, f"{layer}fc2")
        x = norm(x, f"{layer}final_layer_norm", not before)
    x = norm(x, f"{root}final_layer_norm", before)
    x = linear(x, weights, f"{root}project_out") if projected else x
    head = embedding if config["tie_word_embeddings"] else weights["lm_head.weight"]
    return x @ head.T


def bloom(weights: Weights, config: Mapping[str, Any], ids: npt.NDArray[np.int64]) -> Array:
    root, heads = "transformer.", config["n_head"]
    places = np.arange(len(ids))
    distances = places - places[:, None]  # [S, S], at most 0 where attended to
    bias = alibi_slopes(heads)[:, None, None] * distances
    embedding = weights[f"{root}word_embeddings.weight"]
    x = layer_norm(embedding[ids], weights, f"{root}word_embeddings_layernorm")
    for i in range(config["n_layer"]):
        layer = f"{root}h.{i}."
        h = layer_norm(x, weights, f"{layer}input_layernorm")
        fused = linear(h, weights, f"{layer}self_attention.query_key_value")
        q, k, v = fused.reshape(len(ids), heads, 3, -1).transpose(2, 0, 1, 3)
        out = linear(attend(q, k, v, bias), weights, f"{layer}self_attention.dense")
        after = config["apply_residual_connection_post_layernorm"]
        x = out + (h if after else x)
        h = layer_norm(x, weights, f"{layer}post_attention_layernorm")
        inner = gelu_tanh(linear(h, weights, f"{layer}mlp.dense_h_to_4h"))
        x = linear(inner, weights, f"{layer}mlp.dense_4h_to_h") + (h if after else x)
    return layer_norm(x, weights, f"{root}ln_f") @ embedding.T


def alibi_slopes(heads: int) -> Array:
    """As the paper's appendix says it: a geometric sequence, interleaved with the next finer one's."""

    def geometric(n: int) -> list[float]:
        return [2 ** (-8 * (i + 1) / n) for i in range(n)]

    n = 1 << (heads.bit_length() - 1)
    return np.array(geometric(n) + geometric(2 * n)[::2][: heads - n])
