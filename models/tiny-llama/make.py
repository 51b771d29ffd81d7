"""Makes small Llama checkpoints with random weights, in each form that a base model comes in.

``config.json`` beside this file has the sizes: two layers, six heads over two key/value heads,
nothing a power of two that does not have to be. A seed decides the weights, and they are the same
whatever the form they are written in::

    python models/tiny-llama/make.py DIR --layout paddlenlp --container sharded-pdparams

The weights are large enough for attention to be far from uniform and for logits to differ by
several units, so that a tensor that is missing, transposed or swapped for another shows in the
results.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

HERE = Path(__file__).resolve().parent

LAYOUTS = ("huggingface", "paddlenlp")
CONTAINERS = ("safetensors", "sharded-safetensors", "pdparams", "sharded-pdparams")
DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

SPECIALS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# Byte-level BPE writes a space as Ġ and a line feed as Ċ.
MERGES = """
    Ġ t|h e|Ġ a|i n|r e|o n|Ġt he|e r|Ġ s|a t|Ġ w|Ġ o|e n|i s|o r|a n|Ġ c|e s|Ġ b|Ġ f|i t|
    Ġ in|Ġ m|Ġ p|a l|l l|in g|o u|a r|Ġa n|e d
"""
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ bos_token + message['role'] + '\\n' + message['content']"
    " + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token + 'assistant\\n' }}{% endif %}"
)

Array = npt.NDArray[Any]


def make(
    folder: Path,
    *,
    layout: str = "huggingface",
    container: str = "safetensors",
    dtype: str = "float32",
    tied: bool = False,
    shards: int = 3,
    seed: int = 0,
    tokenizer: bool = True,
    **sizes: Any,
) -> Path:
    """Writes a checkpoint.

    Args:
        folder: where to; made when missing, files of the same name are overwritten.
        layout: ``huggingface`` (linear weights [out, in]) or ``paddlenlp`` ([in, out]).
        container: one of :data:`CONTAINERS`; ``pdparams`` needs Paddle.
        dtype: of the stored weights; they are drawn in float32 and rounded once.
        tied: the output layer shares the embedding; then no ``lm_head`` is stored.
        shards: number of files of a sharded container.
        seed: decides the weights.
        tokenizer: also write tokenizer.json, tokenizer_config.json and generation_config.json.
        **sizes: replace entries of config.json.

    Returns:
        The folder.

    Raises:
        ValueError: an unknown layout, container or dtype, or sizes that do not go together.
    """
    for value, known in ((layout, LAYOUTS), (container, CONTAINERS), (dtype, tuple(DTYPES))):
        if value not in known:
            raise ValueError(f"{value!r} is none of {', '.join(known)}")
    config = config_of(dtype=dtype, tied=tied, **sizes)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: a.astype(DTYPES[dtype]) for name, a in weights(config, seed).items()}
    if layout == "paddlenlp":
        tensors = _to_paddlenlp(tensors)
        config = _paddlenlp_config(config)
    _write_json(folder / "config.json", config)
    _write_tensors(folder, tensors, container, shards, "pt" if layout == "huggingface" else "np")
    if tokenizer:
        for name, content in _tokenizer_files(config).items():
            _write_json(folder / name, content)
    return folder


def config_of(*, dtype: str = "float32", tied: bool = False, **sizes: Any) -> dict[str, Any]:
    """config.json with some entries replaced, in Hugging Face's form."""
    config: dict[str, Any] = json.loads((HERE / "config.json").read_text("utf-8"))
    unknown = sizes.keys() - config.keys()
    if unknown:
        raise ValueError(f"config.json has no entry {', '.join(sorted(unknown))}")
    config.update(sizes, torch_dtype=dtype, tie_word_embeddings=tied)
    if config["num_attention_heads"] * config["head_dim"] != config["hidden_size"]:
        raise ValueError("num_attention_heads * head_dim has to be hidden_size")
    if config["num_attention_heads"] % config["num_key_value_heads"]:
        raise ValueError("num_key_value_heads has to divide num_attention_heads")
    return config


def weights(config: Mapping[str, Any], seed: int = 0) -> dict[str, Array]:
    """All tensors in float32 under Hugging Face's names; linear weights are [out, in]."""
    rng = np.random.default_rng(seed)
    E, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    Q = config["num_attention_heads"] * config["head_dim"]
    KV = config["num_key_value_heads"] * config["head_dim"]

    def linear(out: int, into: int, gain: float = 1.0) -> Array:
        return rng.normal(0.0, gain / math.sqrt(into), (out, into)).astype(np.float32)

    def norm() -> Array:
        return rng.uniform(0.6, 1.4, E).astype(np.float32)

    tensors = {"model.embed_tokens.weight": linear(V, E, 2.5)}
    for i in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm": norm(),
            "self_attn.q_proj": linear(Q, E, 1.8),
            "self_attn.k_proj": linear(KV, E, 1.8),
            "self_attn.v_proj": linear(KV, E),
            "self_attn.o_proj": linear(E, Q),
            "post_attention_layernorm": norm(),
            "mlp.gate_proj": linear(F, E, 1.5),
            "mlp.up_proj": linear(F, E, 1.5),
            "mlp.down_proj": linear(E, F),
        }
        tensors.update({f"model.layers.{i}.{n}.weight": a for n, a in layer.items()})
    tensors["model.norm.weight"] = norm()
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = linear(V, E, 2.5)
    return tensors


def _to_paddlenlp(tensors: Mapping[str, Array]) -> dict[str, Array]:
    renamed = {}
    for name, array in tensors.items():
        linear = "_proj." in name or name == "lm_head.weight"
        target = f"llama.{name.removeprefix('model.')}" if name.startswith("model.") else name
        renamed[target] = np.ascontiguousarray(array.T) if linear else array
    return renamed


def _paddlenlp_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """PaddleNLP's form: its own key for the dtype, and its version."""
    kept = {k: v for k, v in config.items() if k not in ("torch_dtype", "mlp_bias", "head_dim")}
    return {**kept, "dtype": config["torch_dtype"], "paddlenlp_version": "3.0.0b4"}


def _write_tensors(
    folder: Path, tensors: Mapping[str, Array], container: str, shards: int, layout_mark: str
) -> None:
    suffix = "safetensors" if container.endswith("safetensors") else "pdparams"
    stem = "model" if suffix == "safetensors" else "model_state"

    def save(path: Path, part: Mapping[str, Array]) -> None:
        if suffix == "safetensors":
            _save_safetensors(path, part, layout_mark)
        else:
            _save_pdparams(path, part)

    if not container.startswith("sharded-"):
        save(folder / f"{stem}.{suffix}", tensors)
        return
    weight_map = {}
    names = list(tensors)
    for index in range(shards):
        file = f"{stem}-{index + 1:05d}-of-{shards:05d}.{suffix}"
        part = {name: tensors[name] for name in names[index::shards]}
        save(folder / file, part)
        weight_map.update(dict.fromkeys(part, file))
    total = sum(array.nbytes for array in tensors.values())
    index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / f"{stem}.{suffix}.index.json", index_file)


def _save_safetensors(path: Path, tensors: Mapping[str, Array], mark: str) -> None:
    from safetensors.numpy import save_file

    _through_temporary(path, lambda p: save_file(dict(tensors), p, metadata={"format": mark}))


def _save_pdparams(path: Path, tensors: Mapping[str, Array]) -> None:
    from peft_deploy.environment import require_paddle

    require_paddle("writing .pdparams")
    import paddle

    def tensor(array: Array) -> Any:
        if array.dtype == DTYPES["bfloat16"]:
            # Paddle takes no bfloat16 from numpy; the way over float32 is exact.
            return paddle.to_tensor(array.astype(np.float32)).astype("bfloat16")
        return paddle.to_tensor(array)

    state = {name: tensor(array) for name, array in tensors.items()}
    _through_temporary(path, lambda p: paddle.save(state, str(p)))


def _write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    _through_temporary(path, lambda p: p.write_text(text, "utf-8"))


def _through_temporary(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def merges() -> list[str]:
    """The merges of the byte-level BPE, most important first."""
    return [pair.strip() for pair in MERGES.split("|")]


def vocabulary() -> list[str]:
    """The tokens in the order of their ids: specials, line feed, printable ASCII, merges."""
    printable = ["Ġ" if c == 32 else chr(c) for c in range(32, 127)]
    return [*SPECIALS.values(), "Ċ", *printable, *(m.replace(" ", "") for m in merges())]


def _tokenizer_files(config: Mapping[str, Any]) -> dict[str, Any]:
    tokens = vocabulary()
    if config["vocab_size"] < len(tokens):
        raise ValueError(f"vocab_size has to be at least {len(tokens)} with a tokenizer")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": token, **flags, "special": True}
            for i, token in enumerate(SPECIALS.values())
        ],
        "pre_tokenizer": {**byte_level, "use_regex": True},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "unk_token": SPECIALS["unk_token"],
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges(),
        },
    }
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {
            **SPECIALS,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        "generation_config.json": ids,
    }


def main() -> int:
    """Command line: writes one checkpoint."""
    parser = argparse.ArgumentParser(description="Make a tiny Llama with random weights.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layout", choices=LAYOUTS, default="huggingface")
    parser.add_argument("--container", choices=CONTAINERS, default="safetensors")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    print(make(**vars(parser.parse_args())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
