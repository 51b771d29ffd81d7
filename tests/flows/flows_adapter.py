"""Random adapters for base models on disk."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from peft_deploy.adapters.formats import write_adapter
from peft_deploy.base import open_base
from peft_deploy.config import LoRAConfig

RANK = 5


def adapter_for(
    base: Path,
    folder: Path,
    *,
    rank: int = RANK,
    seed: int = 7,
    spread: tuple[float, float] = (0.3, 0.2),
    targets: str = ".*_proj",
) -> Path:
    """An adapter on every linear layer of a base model but the head, or what ``targets`` matches, A and B random.

    With the default spread (standard deviations of A and B) the adapter changes a tiny model's logits by about as
    much as they are large: left out, scaled wrongly or transposed, it shows.
    """
    model = open_base(base)
    rng = np.random.default_rng(seed)
    tensors = {}
    for name in model.tensors.names():
        shape = model.tensors.info(name).shape
        module = name.removesuffix(".weight")
        if len(shape) == 2 and re.fullmatch(targets, module):
            tensors[f"{module}.lora_A"] = rng.normal(0, spread[0], (shape[0], rank)).astype(
                "float32"
            )
            tensors[f"{module}.lora_B"] = rng.normal(0, spread[1], (rank, shape[1])).astype(
                "float32"
            )
    config = LoRAConfig(r=rank, lora_alpha=2 * rank, target_modules=[targets])
    write_adapter(folder, config, tensors)
    return folder
