"""A model and an adapter small enough to convert in seconds, made of nothing but a seed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from peft_deploy.adapters.formats import write_adapter
from peft_deploy.base import BaseModel
from peft_deploy.config import LoRAConfig, match_patterns

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
RANK = 4
ALPHA = 6
_WEIGHT = ".weight"

Floats = npt.NDArray[np.float32]


def write_base(folder: Path, seed: int) -> None:
    """Writes the base model: two layers with grouped heads, in Hugging Face's layout, float32.

    The weights are large enough for attention to be far from uniform, so that an error anywhere
    shows in the results.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG), "utf-8")
    save_file(_weights(seed), folder / "model.safetensors", metadata={"format": "pt"})


def write_lora(folder: Path, base: BaseModel, seed: int) -> None:
    """Writes an adapter on all linear layers that the family adapts, its A and B far from zero."""
    rng = np.random.default_rng(seed)
    shapes = {
        name.removesuffix(_WEIGHT): base.tensors.info(name).shape
        for name in base.tensors.names()
        if name.endswith(_WEIGHT)
    }
    patterns = list(base.family.lora_targets)
    matches = match_patterns(patterns, list(shapes), "target_modules")
    tensors: dict[str, npt.NDArray[np.generic]] = {}
    for module in (m for found in matches.values() for m in found):
        into, out = shapes[module]
        tensors[f"{module}.lora_A"] = _normal(rng, (into, RANK), 1 / math.sqrt(into))
        tensors[f"{module}.lora_B"] = _normal(rng, (RANK, out), 0.3)
    write_adapter(folder, LoRAConfig(r=RANK, lora_alpha=ALPHA, target_modules=patterns), tensors)


def _weights(seed: int) -> dict[str, Floats]:
    rng = np.random.default_rng(seed)
    sizes: Mapping[str, int] = {k: v for k, v in CONFIG.items() if isinstance(v, int)}
    E, F, V = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    KV = E // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    linears = {
        "self_attn.q_proj": (E, E),
        "self_attn.k_proj": (KV, E),
        "self_attn.v_proj": (KV, E),
        "self_attn.o_proj": (E, E),
        "mlp.gate_proj": (F, E),
        "mlp.up_proj": (F, E),
        "mlp.down_proj": (E, F),
    }
    tensors: dict[str, Floats] = {}
    for i in range(sizes["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name, (out, into) in linears.items():
            gain = 1.5 / math.sqrt(into)
            tensors[f"{layer}{name}.weight"] = _normal(rng, (out, into), gain)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}{norm}.weight"] = 1 + _normal(rng, (E,), 0.2)
    tensors["model.norm.weight"] = 1 + _normal(rng, (E,), 0.2)
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"{name}.weight"] = _normal(rng, (V, E), 2 / math.sqrt(E))
    return tensors


def _normal(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> Floats:
    return (rng.standard_normal(shape) * scale).astype(np.float32)
