"""PaddleNLP's adapter folders: ``lora_config.json`` beside ``lora_model_state.pdparams`` or
safetensors.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from peft_deploy.adapters.formats.adapter import Adapter
from peft_deploy.adapters.formats.pairs import build_pairs
from peft_deploy.adapters.provenance import Provenance
from peft_deploy.config import LORA_CONFIG_NAME, LoRAConfig
from peft_deploy.config.json_file import make_folder
from peft_deploy.errors import AdapterError, OutputError, listed
from peft_deploy.weights import FLOATING, open_checkpoint
from peft_deploy.weights.source import DTYPES, Array

WEIGHTS_NAME = "lora_model_state.pdparams"
# What readers have to look for, the reference's order first: unified checkpoints' index, its only
# shard without an index, the plain file, and the spelling of the specification.
WEIGHT_FILES = (
    "peft_model.safetensors.index.json",
    "peft_model.safetensors",
    WEIGHTS_NAME,
    "lora_mode_state.pdparams",
)
PICKLE_PROTOCOL = 4  # what paddle.save writes
_RANK_SUFFIX = re.compile(r"lora_mode(?:l)?_state\.(?:\w+_)?(?:tp|pp)\d+.*\.pdparams")
_OTHER_FORMATS = {
    "adapter_config.json": "Hugging Face PEFT's format (adapter_config.json)",
    "prefix_config.json": "a prefix-tuning adapter (prefix_config.json)",
    "vera_config.json": "a VeRA adapter (vera_config.json)",
    "lokr_config.json": "a LoKr adapter (lokr_config.json)",
}


def read_adapter(
    path: Path, config: LoRAConfig | None = None, variant: str | None = None
) -> Adapter:
    """Reads an adapter folder; every tensor is checked, none is trusted.

    Args:
        path: the folder.
        config: in place of the folder's ``lora_config.json``.
        variant: what was given to ``save_pretrained``: it stands before the file's extension.

    Raises:
        AdapterError: no adapter there, files of another format or of single tensor-parallel ranks,
            a damaged file, half a pair, a wrong rank or shape, NaN or infinity.
        LoRAConfigError: a configuration that cannot be used.
    """
    path = Path(path)
    if not path.is_dir():
        kind = "is a file; the adapter's folder is needed" if path.exists() else "does not exist"
        raise AdapterError(f"the adapter {path} {kind}")
    if config is None:
        _check_format(path)
        config = LoRAConfig.from_pretrained(path)
    state = _read_state(_weight_file(path, variant))
    pairs, replacements = build_pairs(state, config, str(path))
    return Adapter(path, config, state, pairs, replacements, Provenance.load(path))


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
    state = {name: _for_pickle(name, array) for name, array in tensors.items()}
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            pickle.dump(state, file, protocol=PICKLE_PROTOCOL)
        temporary.replace(target)
    except OSError as exc:
        raise OutputError(f"{target} cannot be written: {exc}") from exc
    finally:
        temporary.unlink(missing_ok=True)
    config.save_pretrained(folder)
    if provenance is not None:
        provenance.save(folder)
    return target


def with_variant(name: str, variant: str | None) -> str:
    """The file name with the variant before its extension."""
    stem, _, extension = name.rpartition(".")
    return f"{stem}.{variant}.{extension}" if variant else name


def _check_format(folder: Path) -> None:
    if (folder / LORA_CONFIG_NAME).is_file():
        return
    for name, format in _OTHER_FORMATS.items():
        if (folder / name).is_file():
            raise AdapterError(
                f"{folder} holds {format}, which cannot be read yet; "
                f"a PaddleNLP LoRA adapter ({LORA_CONFIG_NAME}) is needed"
            )
    raise AdapterError(
        f"{folder} is not an adapter: it has no {LORA_CONFIG_NAME}",
        hint="give the folder that LoRAModel.save_pretrained wrote",
    )


def _weight_file(folder: Path, variant: str | None) -> Path:
    """The one file of weights in an adapter folder."""
    wanted = [with_variant(name, variant) for name in WEIGHT_FILES]
    present = [name for name in wanted if (folder / name).is_file()]
    if present[:2] == wanted[:2]:
        del present[1]  # an index and its only shard
    if len(present) == 1:
        return folder / present[0]
    if present:
        raise AdapterError(
            f"{folder} holds more than one set of adapter weights:\n{listed(present)}",
            hint="remove all but one",
        )
    shards = [entry.name for entry in folder.iterdir() if _RANK_SUFFIX.fullmatch(entry.name)]
    if shards:
        raise AdapterError(
            f"{folder} holds the adapter in pieces of single parallel ranks:\n{listed(shards)}",
            hint="put them together with: peft-deploy adapter merge-shards DIR DST",
        )
    raise AdapterError(f"{folder} has no adapter weights. Looked for:\n{listed(wanted)}")


def _read_state(file: Path) -> dict[str, Array]:
    checkpoint = open_checkpoint(file)
    strange = [n for n in checkpoint.names() if checkpoint.info(n).dtype not in FLOATING]
    if strange:
        raise AdapterError(
            f"{file} holds tensors that are not floating-point numbers:\n"
            + listed(f"{name}: {checkpoint.info(name).dtype}" for name in strange)
        )
    state = {name: checkpoint.read(name) for name in checkpoint.names()}
    broken = [name for name, array in state.items() if not np.isfinite(array).all()]
    if broken:
        raise AdapterError(
            f"{file} holds NaN or infinity in:\n{listed(broken)}",
            hint="the training may have diverged; use an earlier checkpoint",
        )
    return state


def _for_pickle(name: str, array: Array) -> Array:
    """What paddle.save would store: bfloat16 as its bit patterns."""
    if array.dtype.name not in FLOATING:
        raise AdapterError(
            f"{name} has the type {array.dtype}; an adapter holds floating-point numbers"
        )
    values = np.ascontiguousarray(array)
    return values.view(np.uint16) if values.dtype == DTYPES["bfloat16"] else values
