"""Writes a random Llama of a given size as a sharded Hugging Face checkpoint, and a LoRA adapter for it.

For measurements on models that are larger than memory; one tensor is held at a time. Its numbers are spread as those
of a trained model are, so that its outputs stay finite, and mean nothing.

    python tools/random_llama.py OUTPUT [--size 7b] [--layers N] [--dtype float16] [--shard-size 3GB] [--rank 8]

makes OUTPUT/base and OUTPUT/adapter (PEFT's format, on all linear layers of the blocks, lora_B not zero).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peft_deploy.config.merge import parse_size
from peft_deploy.weights import DTYPES, Array, TensorInfo, write_safetensors

# hidden, intermediate, layers, heads, kv heads, vocabulary
Size = tuple[int, int, int, int, int, int]
SIZES: dict[str, Size] = {
    "tiny": (64, 160, 6, 4, 2, 320),
    "160m": (768, 2048, 12, 12, 4, 32000),
    "1b": (2048, 5632, 22, 32, 4, 32000),
    "3b": (3200, 8640, 26, 32, 32, 32000),
    "7b": (4096, 11008, 32, 32, 32, 32000),
}
_BLOCK = 1 << 22  # elements that are drawn at a time
_ALPHA = 16


class RandomTensors:
    """Tensors that are made when they are read, always the same for one name.

    Args:
        shapes: name → shape; vectors are weights of norms, about 1.
        dtype: of all of them.
        scale: of a matrix's values; by default 1 / √(its second axis), so that products keep their size.
    """

    def __init__(
        self, shapes: dict[str, tuple[int, ...]], dtype: str, scale: float | None = None
    ) -> None:
        self._shapes, self._dtype, self._scale = shapes, dtype, scale

    def names(self) -> Sequence[str]:
        """All names."""
        return list(self._shapes)

    def info(self, name: str) -> TensorInfo:
        """Type and shape."""
        return TensorInfo(name, self._dtype, self._shapes[name])

    def read(self, name: str) -> Array:
        """The numbers of one tensor."""
        shape = self._shapes[name]
        generator = np.random.default_rng(zlib.crc32(name.encode()))
        result = np.empty(math.prod(shape), DTYPES[self._dtype])
        scale = self._scale or 1 / math.sqrt(shape[-1])
        offset, width = (1.0, 0.1) if len(shape) == 1 else (0.0, scale * math.sqrt(3))
        for start in range(0, result.size, _BLOCK):
            piece = result[start : start + _BLOCK]
            drawn = generator.random(piece.size, np.float32)
            drawn -= np.float32(0.5)
            drawn *= np.float32(2 * width)
            drawn += np.float32(offset)
            piece[...] = drawn
        return result.reshape(shape)


def config(size: Size, dtype: str) -> dict[str, Any]:
    """config.json of a size."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = size
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": dtype,
    }


def linear_shapes(size: Size) -> dict[str, tuple[int, int]]:
    """Linear layer within a block → (out, in)."""
    hidden, intermediate, _, heads, kv_heads, _ = size
    kv = hidden // heads * kv_heads
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }


def base_shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model, as Hugging Face names it and lays it."""
    hidden, _, layers, _, _, vocabulary = size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        block = f"model.layers.{i}"
        shapes |= {f"{block}.{n}.weight": shape for n, shape in linear_shapes(size).items()}
        shapes |= {
            f"{block}.{n}.weight": (hidden,)
            for n in ("input_layernorm", "post_attention_layernorm")
        }
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def adapter_shapes(size: Size, rank: int) -> dict[str, tuple[int, ...]]:
    """A [rank, in] and B [out, rank] of every linear layer, as PEFT names and lays them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(size[2]):
        for name, (rows, columns) in linear_shapes(size).items():
            module = f"base_model.model.model.layers.{i}.{name}"
            shapes[f"{module}.lora_A.weight"] = (rank, columns)
            shapes[f"{module}.lora_B.weight"] = (rows, rank)
    return shapes


def write_base(folder: Path, size: Size, dtype: str, shard_bytes: int) -> None:
    """The checkpoint."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config(size, dtype), indent=2) + "\n", "utf-8")
    tensors = RandomTensors(base_shapes(size), dtype)
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"}, shard_bytes)


def write_adapter(folder: Path, size: Size, rank: int) -> None:
    """The adapter; its change of a weight is a few per cent of the weight."""
    folder.mkdir(parents=True)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": _ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": [name.rpartition(".")[2] for name in linear_shapes(size)],
    }
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "adapter_config.json").write_text(text, "utf-8")
    scale = 0.1 / math.sqrt(size[0])
    tensors = RandomTensors(adapter_shapes(size, rank), "float32", math.sqrt(scale / _ALPHA))
    write_safetensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})


def main() -> int:
    """Writes both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--layers", type=int, help="in place of the size's own number")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--shard-size", default="3GB")
    parser.add_argument("--rank", type=int, default=8)
    arguments = parser.parse_args()
    size = SIZES[arguments.size]
    if arguments.layers:
        size = (*size[:2], arguments.layers, *size[3:])
    shard_bytes = parse_size(arguments.shard_size)
    write_base(arguments.output / "base", size, arguments.dtype, shard_bytes)
    write_adapter(arguments.output / "adapter", size, arguments.rank)
    return 0


if __name__ == "__main__":
    sys.exit(main())
