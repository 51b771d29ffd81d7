"""Adapters that lie on disk as the files of tensor-parallel ranks, put together while reading."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_deploy.adapters.formats.state_file import read_state
from peft_deploy.config import LORA_CONFIG_NAME, PREFIX_CONFIG_NAME, LoRAConfig
from peft_deploy.config.json_file import read_object
from peft_deploy.errors import AdapterError, CheckpointError, UnsupportedModelError, listed
from peft_deploy.families import find_family, parallel_axes
from peft_deploy.weights.source import Array
from peft_deploy.weights.tensor_parallel import AxisOf, merge_shards

MODEL_CONFIG = "config.json"
SINGLE_RANK = -1  # the tensor_parallel_degree that the reference writes after merging
RANK_FILE = re.compile(r"lora_model?_state\.tp(\d+)\.pdparams")


def has_rank_files(folder: Path) -> bool:
    """Whether a folder holds files of tensor-parallel ranks."""
    return any(RANK_FILE.fullmatch(entry.name) for entry in folder.iterdir())


def find_rank_files(folder: Path) -> list[Path]:
    """The weight files of all ranks, in their order.

    Raises:
        AdapterError: not a folder of a LoRA adapter's ranks, some ranks missing, or pipeline stages.
    """
    if not folder.is_dir():
        raise AdapterError(f"{folder} is not a folder")
    if (folder / PREFIX_CONFIG_NAME).is_file():
        raise AdapterError(
            f"{folder} holds a prefix: what the columns of its ranks mean is not what they mean "
            "on a single card, so putting them together gives another prefix",
            hint="train it again with tensor_parallel_degree 1",
        )
    names = [entry.name for entry in folder.iterdir()]
    found = {name: match for name in names if (match := RANK_FILE.fullmatch(name))}
    stages = [name for name in names if re.search(r"[._]pp\d+\.pdparams$", name)]
    if stages:
        raise AdapterError(
            f"{folder} holds the files of pipeline stages, whose layers have other names:\n"
            f"{listed(stages)}",
            hint="save the adapter from a run without pipeline parallelism",
        )
    if not found:
        raise AdapterError(
            f"{folder} holds no files of tensor-parallel ranks, such as "
            f"lora_model_state.tp00.pdparams. It holds:\n{listed(names)}"
        )
    ranks = {int(match[1]): name for name, match in found.items()}
    missing = [f"rank {i}" for i in range(max(ranks) + 1) if i not in ranks]
    if missing or len(ranks) != len(found):
        raise AdapterError(
            f"{folder} does not hold one file a rank:\n{listed(missing or found)}",
        )
    return [folder / ranks[i] for i in sorted(ranks)]


def read_ranks(
    folder: Path, config: LoRAConfig, model_config: Mapping[str, Any] | None
) -> dict[str, Array]:
    """The tensors that all ranks hold together.

    Args:
        folder: with ``lora_model_state.tp00.pdparams``, ``….tp01.pdparams``, ….
        config: the adapter's options, which say how many ranks there were.
        model_config: what the base model's config.json says; the one in ``folder`` when None.

    Raises:
        AdapterError: ranks missing, of different checkpoints, or of something that cannot be merged.
        UnsupportedModelError: how the model is spread over ranks is not known.
        CheckpointError: the folder's config.json cannot be read.
    """
    files = find_rank_files(folder)
    degree = len(files)
    if config.tensor_parallel_degree != degree:
        raise AdapterError(
            f"{folder} holds {degree} ranks; its {LORA_CONFIG_NAME} says "
            f"tensor_parallel_degree {config.tensor_parallel_degree}",
            hint="are all files there, and none of another run?",
        )
    axis_of = rank_axes(
        read_model_config(folder) if model_config is None else model_config, degree
    )
    return merge_shards([read_state(file) for file in files], axis_of)


def rank_axes(model_config: Mapping[str, Any], degree: int) -> AxisOf:
    """Along which axis each tensor of a model's adapter is spread.

    Raises:
        AdapterError: the model cannot be spread over so many ranks.
        UnsupportedModelError: how it is spread is not known.
    """
    try:
        return parallel_axes(find_family(model_config), model_config, degree)
    except UnsupportedModelError as exc:
        raise UnsupportedModelError(
            f"the files of {degree} tensor-parallel ranks cannot be put together: {exc.message}",
            hint="save the adapter with save_pretrained(…, merge_tensor_parallel=True), which asks "
            "the layers themselves",
        ) from exc


def read_model_config(path: Path) -> Mapping[str, Any]:
    """A base model's config.json.

    Args:
        path: the file, or the folder that it lies in.

    Raises:
        AdapterError: it is missing.
        CheckpointError: it cannot be read.
    """
    file = path / MODEL_CONFIG if path.is_dir() else path
    if not file.is_file():
        raise AdapterError(
            f"{file} is missing; it says which layers were spread over the ranks",
            hint="name the base model's config.json: "
            "peft-deploy adapter merge-shards DIR DST --config FILE",
        )
    return read_object(file, CheckpointError)
