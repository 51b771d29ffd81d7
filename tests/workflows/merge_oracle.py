"""Random adapters, and the merged weights in float64."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from peft_deploy.adapters.formats import write_adapter
from peft_deploy.adapters.provenance import Provenance
from peft_deploy.base import open_base
from peft_deploy.config import LoRAConfig
from peft_deploy.weights import DTYPES, Array

HALF_STEP = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}

RANK, ALPHA = 5, 10
SCALING = ALPHA / RANK
Q0 = "llama.layers.0.self_attn.q_proj"


def write_lora(
    folder: Path,
    base: Path,
    *,
    seed: int = 7,
    spread: float = 0.2,
    replaced: Mapping[str, Array] | None = None,
    provenance: Provenance | None = None,
    **extra: Any,
) -> dict[str, Array]:
    """A and B for every projection, both random; gives back the file's tensors."""
    rng = np.random.default_rng(seed)
    model = open_base(base)
    tensors: dict[str, Array] = {}
    for name in model.tensors.names():
        if "_proj" in name:
            module, shape = name.removesuffix(".weight"), model.tensors.info(name).shape
            A = rng.normal(0, 0.3, (shape[0], RANK)).astype(np.float32)
            B = rng.normal(spread / 4, spread, (RANK, shape[1])).astype(np.float32)
            tensors |= {f"{module}.lora_A": A, f"{module}.lora_B": B}
    tensors |= replaced or {}
    config = LoRAConfig(r=RANK, lora_alpha=ALPHA, target_modules=[".*_proj"], **extra)
    write_adapter(folder, config, tensors, provenance)
    return tensors


def oracle(weights: Mapping[str, Array], lora: Mapping[str, Array], base_dtype: str):
    """The merged weights in float64 under Hugging Face's names, [out, in], and the changes alone."""
    exact, change = {}, {}
    for name, array in weights.items():
        W = array.astype(DTYPES[base_dtype]).astype(np.float64)
        module = "llama." + name.removeprefix("model.").removesuffix(".weight")
        change[name] = np.zeros_like(W)
        if f"{module}.lora_A" in lora:
            A, B = (lora[f"{module}.lora_{half}"].astype(np.float64) for half in "AB")
            change[name] = SCALING * (A @ B).T
        exact[name] = W + change[name]
    return exact, change


def stored(folder: Path) -> tuple[dict[str, Array], list[dict[str, str]]]:
    """The tensors and the metadata of all files, as the safetensors library reads them."""
    tensors: dict[str, Array] = {}
    metadata = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as opened:
            metadata.append(opened.metadata())
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors, metadata


def assert_rounded_once(got: Mapping[str, Array], exact: Mapping[str, Array], dtype: str) -> None:
    assert got.keys() == exact.keys()
    for name, array in got.items():
        assert array.dtype == DTYPES[dtype], name
        error = np.abs(array.astype(np.float64) - exact[name])
        # half a step of the type, and what float32 loses on the way
        allowed = HALF_STEP[dtype] * np.abs(exact[name]) + 2e-6
        assert (error <= allowed).all(), (name, error.max())
