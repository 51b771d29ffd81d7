"""Llama, Qwen2, Mistral and Gemma in NumPy, from their papers and the tensors of Hugging Face's checkpoints alone.

One text at a time, no cache, float64. Weights go by Hugging Face's names, in torch's layout. Where PaddleNLP, the
measure of what is exported, departs from the papers, so does this: Mistral attends to the whole text and embeds its
padding token as zero, Gemma computes the erf form of GELU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
_erf = np.vectorize(math.erf)


def logits(weights: Mapping[str, Array], config: Mapping[str, Any], ids: Array) -> Array:
    """[S] → [S, V]."""
    gemma = config["model_type"] == "gemma"
    x = weights["model.embed_tokens.weight"][ids]
    if config["model_type"] == "mistral":
        x[ids == config["pad_token_id"]] = 0.0
    if gemma:
        x = x * math.sqrt(config["hidden_size"])

    def norm(x: Array, name: str) -> Array:
        scale = weights[f"{name}.weight"] + (1.0 if gemma else 0.0)
        root = np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"])
        return x / root * scale

    def linear(x: Array, name: str) -> Array:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    angles = np.arange(len(ids))[:, None] * frequencies(config)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        h = norm(x, f"{layer}.input_layernorm")
        q, k, v = (linear(h, f"{layer}.self_attn.{n}_proj") for n in "qkv")
        x = x + linear(attend(q, k, v, angles, config), f"{layer}.self_attn.o_proj")
        h = norm(x, f"{layer}.post_attention_layernorm")
        gate, up = (linear(h, f"{layer}.mlp.{n}_proj") for n in ("gate", "up"))
        act = gate * (1 + _erf(gate / math.sqrt(2))) / 2 if gemma else gate / (1 + np.exp(-gate))
        x = x + linear(act * up, f"{layer}.mlp.down_proj")
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return norm(x, "model.norm") @ head.T


def frequencies(config: Mapping[str, Any]) -> Array:
    """Radians a position, [D/2], as transformers derives them from config.json."""
    D, scaling = config["head_dim"], config.get("rope_scaling") or {}
    plain = float(config["rope_theta"]) ** -(np.arange(0, D, 2) / D)
    kind = scaling.get("rope_type")
    if kind == "linear":
        return plain / scaling["factor"]
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return kept * plain + (1 - kept) * plain / scaling["factor"]
    assert kind is None
    return plain


def attend(q: Array, k: Array, v: Array, angles: Array, config: Mapping[str, Any]) -> Array:
    H, K, D = (config[n] for n in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    q, k, v = q.reshape(-1, H, D), k.reshape(-1, K, D), v.reshape(-1, K, D)
    q, k = rotate(q, angles), rotate(k, angles)
    outs = []
    for head in range(H):
        kv = head // (H // K)
        scores = q[:, head] @ k[:, kv].T / math.sqrt(D)
        scores[np.triu_indices(len(scores), 1)] = -np.inf
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        outs.append(shares / shares.sum(-1, keepdims=True) @ v[:, kv])
    return np.concatenate(outs, -1)


def rotate(x: Array, angles: Array) -> Array:
    a, b = np.split(x, 2, -1)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
