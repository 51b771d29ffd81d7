"""A small family for the tests of weights: names in both schemes, weights in both layouts."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from peft_deploy.families.names import NameMap, NameRule
from peft_deploy.weights import DTYPES, Array

HIDDEN, INNER, VOCABULARY, LAYERS = 12, 20, 32, 2
BFLOAT16 = DTYPES["bfloat16"]

NAME_MAP = NameMap(
    [
        NameRule("toy.embed_tokens.weight", "model.embed_tokens.weight"),
        NameRule("toy.layers.{i}.attn.q_proj.weight", "model.layers.{i}.attn.q_proj.weight", True),
        NameRule("toy.layers.{i}.attn.q_proj.bias", "model.layers.{i}.attn.q_proj.bias"),
        NameRule("toy.layers.{i}.mlp.up_proj.weight", "model.layers.{i}.mlp.up_proj.weight", True),
        NameRule("toy.layers.{i}.norm.weight", "model.layers.{i}.norm.weight"),
        NameRule("lm_head.weight", "lm_head.weight", True),
    ],
    ignored=[r"model\.layers\.\d+\.attn\.inv_freq"],
)
TIED = {"lm_head.weight": "toy.embed_tokens.weight"}


def paddle_weights(
    seed: int = 0, dtype: str = "float32", *, head: bool = True
) -> dict[str, Array]:
    """PaddleNLP's names and layout; every value far from every other."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(DTYPES[dtype])

    result = {"toy.embed_tokens.weight": draw(VOCABULARY, HIDDEN)}
    for i in range(LAYERS):
        # square, so that only the values tell a matrix from its transpose
        result[f"toy.layers.{i}.attn.q_proj.weight"] = draw(HIDDEN, HIDDEN)
        result[f"toy.layers.{i}.attn.q_proj.bias"] = draw(HIDDEN)
        result[f"toy.layers.{i}.mlp.up_proj.weight"] = draw(HIDDEN, INNER)
        result[f"toy.layers.{i}.norm.weight"] = draw(HIDDEN)
    if head:
        result["lm_head.weight"] = draw(HIDDEN, VOCABULARY)
    return result


def to_huggingface(weights: Mapping[str, Array]) -> dict[str, Array]:
    result = {}
    for name, array in weights.items():
        mapped = NAME_MAP.to_huggingface(name)
        assert mapped is not None
        result[mapped.name] = np.ascontiguousarray(array.T if mapped.transpose else array)
    return result


def shapes(weights: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in weights.items()}


def save_safetensors(path: Path, weights: Mapping[str, Array], format: str = "pt") -> None:
    save_file(dict(weights), path, metadata={"format": format})


def save_pdparams(path: Path, weights: Mapping[str, Array], protocol: int = 4) -> None:
    """What paddle.save writes: bfloat16 as uint16, and the table of Paddle's own names."""
    content: dict[str, object] = {
        name: array.view(np.uint16) if array.dtype == BFLOAT16 else array
        for name, array in weights.items()
    }
    content["StructuredToParameterName@@"] = {n: f"linear_{i}.w_0" for i, n in enumerate(weights)}
    path.write_bytes(pickle.dumps(content, protocol=protocol))


def save_sharded(
    folder: Path,
    weights: Mapping[str, Array],
    save: Callable[[Path, Mapping[str, Array]], None],
    stem: str = "model",
    suffix: str = ".safetensors",
    shards: int = 3,
) -> Path:
    """Deals the tensors out to shards one by one; returns the index."""
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        name = f"{stem}-{shard + 1:05}-of-{shards:05}{suffix}"
        part = dict(list(weights.items())[shard::shards])
        save(folder / name, part)
        weight_map |= dict.fromkeys(part, name)
    index = folder / f"{stem}{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return index


class ArrayTensors:
    """Arrays in memory as a source that counts what is read."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        from peft_deploy.weights import TensorInfo

        self.arrays = dict(arrays)
        self.reads: list[str] = []
        self._infos = {n: TensorInfo(n, a.dtype.name, a.shape) for n, a in arrays.items()}

    def names(self) -> list[str]:
        return list(self.arrays)

    def info(self, name: str):
        return self._infos[name]

    def read(self, name: str) -> Array:
        self.reads.append(name)
        return self.arrays[name]
