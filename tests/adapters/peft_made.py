"""PEFT folders written by hand, and what they mean, in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from peft_deploy.families import find_family
from peft_deploy.weights.source import DTYPES, TensorInfo

NAMES = find_family({"architectures": ["LlamaForCausalLM"]}).names({})
HIDDEN, KV, INNER, VOCAB, LAYERS = 8, 4, 12, 11, 2
OUT_IN = {  # torch's weights are [out, in]
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
PREFIX = "base_model.model."
Tensors = dict[str, np.ndarray]


def ordinary() -> dict[str, Any]:
    """A configuration as PEFT writes it."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
        "base_model_name_or_path": "some/base",
        "revision": None,
        "inference_mode": True,
        "r": 3,
        "lora_alpha": 7,
        "lora_dropout": 0.05,
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "trainable_token_indices": None,
        "loftq_config": {},
        "eva_config": None,
        "corda_config": None,
        "layer_replication": None,
        "qalora_group_size": 16,
    }


def lora_tensors(ranks: Mapping[str, int], dtype: str = "float32", seed: int = 3) -> Tensors:
    """Module → rank, as PEFT's tensors; no element of B is near zero."""
    generator = np.random.default_rng(seed)
    tensors: Tensors = {}
    for module, rank in ranks.items():
        out, inner = OUT_IN[".".join(module.split(".")[-2:])]
        A = generator.standard_normal((rank, inner))
        B = generator.uniform(0.5, 1.5, (out, rank)) * generator.choice([-1, 1], (out, rank))
        tensors[f"{PREFIX}{module}.lora_A.weight"] = A.astype(DTYPES[dtype])
        tensors[f"{PREFIX}{module}.lora_B.weight"] = B.astype(DTYPES[dtype])
    return tensors


def layers_of(*parts: str, rank: int = 3) -> dict[str, int]:
    return {f"model.layers.{i}.{part}": rank for i in range(LAYERS) for part in parts}


QV = layers_of("self_attn.q_proj", "self_attn.v_proj")


def write(folder: Path, tensors: Tensors | None = None, **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {**ordinary(), **options}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    kept = lora_tensors(QV) if tensors is None else tensors
    save_file(
        {name: np.ascontiguousarray(array) for name, array in kept.items()},
        folder / "adapter_model.safetensors",
        {"format": "pt"},
    )
    return folder


def delta(tensors: Tensors, module: str, scaling: float) -> np.ndarray:
    """The change of a linear layer's weight in Paddle's layout [in, out], in float64."""
    A = tensors[f"{PREFIX}{module}.lora_A.weight"].astype(np.float64)
    B = tensors[f"{PREFIX}{module}.lora_B.weight"].astype(np.float64)
    return scaling * (B @ A).T


def paddle(module: str) -> str:
    return f"llama.{module.removeprefix('model.')}"


def plain(alpha: float, rank: int) -> float:
    return alpha / rank


def rank_stable(alpha: float, rank: int) -> float:
    return alpha / math.sqrt(rank)


class Arrays:
    """A base model's tensors in memory."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors

    def names(self) -> list[str]:
        return list(self.tensors)

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(name, self.tensors[name].dtype.name, self.tensors[name].shape)

    def read(self, name: str) -> np.ndarray:
        return self.tensors[name]


def base() -> Tensors:
    """The base model's adapted weights, embeddings and head in Paddle's layout."""
    generator = np.random.default_rng(8)
    shapes = {
        f"llama.layers.{i}.{part}.weight": shape[::-1]
        for i in range(LAYERS)
        for part, shape in OUT_IN.items()
    }
    shapes |= {"llama.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (HIDDEN, VOCAB)}
    return {n: generator.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
