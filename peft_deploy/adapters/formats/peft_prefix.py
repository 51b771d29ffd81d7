"""Hugging Face PEFT's prefix folders: one matrix ``prompt_embeddings``, and the way from its order to PaddleNLP's.

A row of PEFT's matrix, [P, L · 2 · K · D], has key and value side by side layer by layer; PaddleNLP's has the keys of
all layers first, then the values of all layers. Taken for one another, they give plausible nonsense of the same shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_deploy.adapters.formats.peft_config import PEFT_CONFIG_NAME, PREFIX, read_peft_json
from peft_deploy.adapters.formats.peft_files import PEFT_WEIGHTS_NAME, peft_weights
from peft_deploy.adapters.formats.peft_writer import ArraySource
from peft_deploy.adapters.formats.prefix import EMBEDDING, PrefixAdapter
from peft_deploy.adapters.formats.state_file import read_state
from peft_deploy.adapters.provenance import Provenance
from peft_deploy.config import PrefixConfig
from peft_deploy.config.json_file import make_folder, write_json
from peft_deploy.errors import AdapterError, listed
from peft_deploy.families import ModelDims
from peft_deploy.weights.source import Array
from peft_deploy.weights.writer import write_safetensors

PROMPT = "prompt_embeddings"


def read_peft_prefix(path: Path, dims: ModelDims) -> PrefixAdapter:
    """Reads a PEFT prefix; every size is compared with the base model's.

    PEFT stores the flat prefix also where a projection was trained, so that is what is read.

    Args:
        path: the folder.
        dims: the base model's sizes.

    Raises:
        AdapterError: no such prefix, one of another model, an encoder in place of the flat prefix, damaged files.
    """
    path = Path(path)
    config = read_peft_json(path)
    if config["peft_type"] != PREFIX:
        raise AdapterError(
            f"{path} is a PEFT adapter of the type {config['peft_type']}, no {PREFIX}"
        )
    state = read_state(peft_weights(path))
    if set(state) != {PROMPT}:
        raise AdapterError(
            f"{path} has to hold {PROMPT} and nothing else; an encoder cannot be read. It holds:\n"
            + listed(state),
            hint="save it with PEFT's save_pretrained, which stores the flat prefix",
        )
    _check_sizes(config, state[PROMPT], dims, path)
    array = to_paddle_order(state[PROMPT], dims.num_layers)
    grouped = dims.num_kv_heads != dims.num_heads
    options = PrefixConfig(
        num_prefix_tokens=int(array.shape[0]),
        num_attention_heads=dims.num_heads,
        multi_query_group_num=dims.num_kv_heads if grouped else None,
        num_hidden_layers=dims.num_layers,
        hidden_size=dims.hidden_size,
        dtype=array.dtype.name,
    )
    return PrefixAdapter(path, options, {EMBEDDING: array}, Provenance.load(path))


def write_peft_prefix(folder: Path, prefix: PrefixAdapter, base_name: str | None = None) -> Path:
    """Writes a folder that PEFT loads, with the prefix's bits in PEFT's order; a projection is evaluated.

    Args:
        folder: made when it is missing; each file appears whole or not at all.
        prefix: what to write.
        base_name: what the folder says of the base model.

    Returns:
        The file of weights.

    Raises:
        AdapterError: its keys and values are not all finite.
        OutputError: the folder cannot be written.
    """
    prefix = prefix.flattened()
    array = to_peft_order(prefix.state[EMBEDDING], prefix.num_layers)
    width = prefix.num_kv_heads * prefix.head_dim
    config = {
        "peft_type": PREFIX,
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
        "revision": None,
        "inference_mode": True,
        "base_model_name_or_path": base_name,
        "num_virtual_tokens": prefix.num_tokens,
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_attention_heads": prefix.num_kv_heads,
        "num_layers": prefix.num_layers,
        "encoder_hidden_size": width,
        "prefix_projection": False,
    }
    target = make_folder(folder) / PEFT_WEIGHTS_NAME
    write_safetensors(target, ArraySource({PROMPT: array}), {"format": "pt"})
    write_json(folder / PEFT_CONFIG_NAME, config)
    if prefix.provenance is not None:
        prefix.provenance.save(folder)
    return target


def to_paddle_order(rows: Array, num_layers: int) -> Array:
    """From key and value by layer to all keys, then all values; [P, L · 2 · K · D] either way."""
    by_layer = rows.reshape(rows.shape[0], num_layers, 2, -1)  # [P, L, 2, K·D]
    return by_layer.transpose(0, 2, 1, 3).reshape(rows.shape)


def to_peft_order(rows: Array, num_layers: int) -> Array:
    """The inverse of :func:`to_paddle_order`."""
    by_half = rows.reshape(rows.shape[0], 2, num_layers, -1)  # [P, 2, L, K·D]
    return by_half.transpose(0, 2, 1, 3).reshape(rows.shape)


def _check_sizes(config: Mapping[str, Any], array: Array, dims: ModelDims, where: Path) -> None:
    width = dims.num_kv_heads * dims.head_dim
    wanted = {
        "num_layers": dims.num_layers,
        "num_attention_heads": dims.num_kv_heads,
        "token_dim": width,
        "num_transformer_submodules": 1,
    }
    wrong = [
        f"{key}: {config[key]} in {PEFT_CONFIG_NAME}, {value} by the base model"
        for key, value in wanted.items()
        if config.get(key) not in (None, value)
    ]
    shape = [config.get("num_virtual_tokens"), 2 * dims.num_layers * width]
    if list(array.shape) != shape:
        wrong.append(f"{PROMPT}: {list(array.shape)} in the file, {shape} by both")
    if wrong:
        raise AdapterError(
            f"{where} does not fit the base model:\n{listed(wrong)}",
            hint="is it a prefix of another model, or one whose heads are not grouped?",
        )
