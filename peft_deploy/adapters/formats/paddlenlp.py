"""PaddleNLP's adapter folders: ``lora_config.json`` beside ``lora_model_state.pdparams`` or
safetensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft_deploy.adapters.formats.adapter import Adapter
from peft_deploy.adapters.formats.pairs import build_pairs
from peft_deploy.adapters.formats.ranks import SINGLE_RANK, has_rank_files, read_ranks
from peft_deploy.adapters.formats.state_file import (
    find_state_file,
    read_state,
    with_variant,
    write_state,
)
from peft_deploy.adapters.provenance import Provenance, without_samples
from peft_deploy.config import LORA_CONFIG_NAME, LoRAConfig
from peft_deploy.config.json_file import make_folder
from peft_deploy.errors import AdapterError
from peft_deploy.weights.source import Array

WEIGHTS_NAME = "lora_model_state.pdparams"
# What readers have to look for, the reference's order first: unified checkpoints' index, its only
# shard without an index, the plain file, and the spelling of the specification.
WEIGHT_FILES = (
    "peft_model.safetensors.index.json",
    "peft_model.safetensors",
    WEIGHTS_NAME,
    "lora_mode_state.pdparams",
)
_RANK_FILES = re.compile(r"lora_mode(?:l)?_state\.(?:\w+_)?(?:tp|pp)\d+.*\.pdparams")
_RANKS_HINT = "save it again with save_pretrained(…, merge_tensor_parallel=True)"
_CONVERT = "convert it: peft-deploy adapter convert DIR DST --to paddle --base BASE"
_OTHER_FORMATS = {
    "adapter_config.json": "Hugging Face PEFT's format (adapter_config.json)",
    "prefix_config.json": "a prefix-tuning adapter (prefix_config.json)",
    "vera_config.json": "a VeRA adapter (vera_config.json)",
    "lokr_config.json": "a LoKr adapter (lokr_config.json)",
}


def read_adapter(
    path: Path,
    config: LoRAConfig | None = None,
    variant: str | None = None,
    model_config: Mapping[str, Any] | None = None,
) -> Adapter:
    """Reads an adapter folder; every tensor is checked, none is trusted.

    The files of tensor-parallel ranks are put together on the way.

    Args:
        path: the folder.
        config: in place of the folder's ``lora_config.json``.
        variant: what was given to ``save_pretrained``: it stands before the file's extension.
        model_config: for the files of ranks, what the base model's config.json says; the folder's
            own config.json when None.

    Raises:
        AdapterError: no adapter there, files of another format, ranks that do not belong together,
            a damaged file, half a pair, a wrong rank or shape, NaN or infinity.
        UnsupportedModelError: files of ranks, of a model of which it is not known how it is spread.
        LoRAConfigError: a configuration that cannot be used.
    """
    path = Path(path)
    if not path.is_dir():
        kind = "is a file; the adapter's folder is needed" if path.exists() else "does not exist"
        raise AdapterError(f"the adapter {path} {kind}")
    if config is None:
        _check_format(path)
        config = LoRAConfig.from_pretrained(path)
    provenance = Provenance.load(path)
    names = [with_variant(name, variant) for name in WEIGHT_FILES]
    whole = any((path / name).is_file() for name in names)
    if variant is None and not whole and has_rank_files(path):
        state = read_ranks(path, config, model_config)
        config = replace(config, tensor_parallel_degree=SINGLE_RANK)
        provenance = without_samples(provenance)
    else:
        state = read_state(find_state_file(path, names, _RANK_FILES, _RANKS_HINT))
    pairs, replacements = build_pairs(state, config, str(path))
    return Adapter(path, config, state, pairs, replacements, provenance)


def write_adapter(
    path: Path,
    config: LoRAConfig,
    tensors: Mapping[str, Array],
    provenance: Provenance | None = None,
    variant: str | None = None,
) -> Path:
    """Writes an adapter folder as the reference does; each file appears whole or not at all.

    Args:
        path: the folder; made when it is missing.
        config: its options.
        tensors: by name, without a prefix for the wrapping model.
        provenance: written beside the reference's files.
        variant: stands before the extension of the weight file.

    Returns:
        The weight file.

    Raises:
        OutputError: something cannot be written.
    """
    folder = make_folder(Path(path))
    target = folder / with_variant(WEIGHTS_NAME, variant)
    write_state(target, tensors)
    config.save_pretrained(folder)
    if provenance is not None:
        provenance.save(folder)
    return target


def _check_format(folder: Path) -> None:
    if (folder / LORA_CONFIG_NAME).is_file():
        return
    for name, format in _OTHER_FORMATS.items():
        if (folder / name).is_file():
            raise AdapterError(
                f"{folder} holds {format}; a PaddleNLP LoRA adapter ({LORA_CONFIG_NAME}) is needed here",
                hint=_CONVERT if name == "adapter_config.json" else None,
            )
    raise AdapterError(
        f"{folder} is not an adapter: it has no {LORA_CONFIG_NAME}",
        hint="give the folder that LoRAModel.save_pretrained wrote",
    )
