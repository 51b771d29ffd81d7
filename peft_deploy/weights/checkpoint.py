"""A folder of weight files, or one of them, as one source of tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from peft_deploy.errors import CheckpointError, listed
from peft_deploy.weights.pdparams import PdparamsFile
from peft_deploy.weights.safetensors_file import SafetensorsFile
from peft_deploy.weights.source import Array, TensorInfo

INDEX_SUFFIX = ".index.json"
# What a folder may hold, Hugging Face's and PaddleNLP's names.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "model_state.pdparams",
    "model_state.pdparams.index.json",
)
FORMATS: dict[str, type[SafetensorsFile] | type[PdparamsFile]] = {
    "safetensors": SafetensorsFile,
    "pdparams": PdparamsFile,
}


class Checkpoint:
    """The tensors of one checkpoint, whatever files they are in; made by :func:`open_checkpoint`.

    Attributes:
        path: what was opened: a folder or a file.
        files: the files that hold tensors.
        format: ``"safetensors"`` or ``"pdparams"``.
        metadata: safetensors' own text metadata, of the first file.
    """

    def __init__(
        self, path: Path, format: str, parts: Sequence[SafetensorsFile | PdparamsFile]
    ) -> None:
        self.path = path
        self.format = format
        self.files = tuple(part.path for part in parts)
        self.metadata: Mapping[str, str] = parts[0].metadata
        self._part_of = {name: part for part in parts for name in part.names()}

    def names(self) -> Sequence[str]:
        """All names, file by file."""
        return list(self._part_of)

    def info(self, name: str) -> TensorInfo:
        """Type and shape of one tensor; KeyError for an unknown name."""
        return self._part_of[name].info(name)

    def read(self, name: str) -> Array:
        """The data of one tensor, mapped or read from its file."""
        return self._part_of[name].read(name)


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens the weights of a model; every file's structure is checked, no tensor is read.

    Args:
        path: a folder that holds one of :data:`WEIGHT_FILES`, or a ``.safetensors``,
            ``.pdparams`` or ``.index.json`` file.

    Raises:
        CheckpointError: nothing to open, more than one thing to open, or a damaged file.
    """
    file = _choose(path) if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{path} does not exist")
    stem = file.name.removesuffix(INDEX_SUFFIX)
    format = stem.rpartition(".")[2]
    if format not in FORMATS:
        raise CheckpointError(
            f"{file} is not a file of weights that can be read: its name has to end in "
            f".safetensors or .pdparams, or in one of these with {INDEX_SUFFIX}"
        )
    if file.name.endswith(INDEX_SUFFIX):
        return Checkpoint(path, format, _open_shards(file, format))
    part = FORMATS[format](file)
    if not part.names():
        raise CheckpointError(f"{file} holds no tensor")
    return Checkpoint(path, format, [part])


def _choose(folder: Path) -> Path:
    """The one file to open in a folder."""
    present = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not present:
        there = sorted(entry.name for entry in folder.iterdir())
        raise CheckpointError(
            f"{folder} holds no weights. Looked for:\n{listed(WEIGHT_FILES)}\n"
            + (f"The folder holds:\n{listed(there)}" if there else "The folder is empty."),
            hint=_hint_for(there),
        )
    if (
        len(present) == 2
        and present[1].name == present[0].name + INDEX_SUFFIX
        # a checkpoint of one shard may have that shard under the plain name
        and set(_weight_map(present[1]).values()) == {present[0].name}
    ):
        return present[1]
    if len(present) > 1:
        raise CheckpointError(
            f"{folder} holds more than one set of weights:\n{listed(p.name for p in present)}",
            hint="remove all but one, or name the file to read",
        )
    return present[0]


def _hint_for(there: Sequence[str]) -> str | None:
    if any(".tp0" in name and name.endswith(".pdparams") for name in there):
        return "these are tensor-parallel shards; merge them first"
    if any(name.startswith("pytorch_model") for name in there):
        return "save the model with safe_serialization=True; pickles of torch are not read"
    if any(name.endswith((".safetensors", ".pdparams")) for name in there):
        return "name the file itself if that is the one to read"
    return None


def _open_shards(index: Path, format: str) -> list[SafetensorsFile | PdparamsFile]:
    weight_map = _weight_map(index)
    shard_names = list(dict.fromkeys(weight_map.values()))
    missing = [name for name in shard_names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index} names shards that are not there:\n{listed(missing)}",
            hint="the download may be incomplete",
        )
    parts = [FORMATS[format](index.parent / name) for name in shard_names]
    _check_shards(index, weight_map, parts)
    return parts


def _check_shards(
    index: Path,
    weight_map: Mapping[str, str],
    parts: Sequence[SafetensorsFile | PdparamsFile],
) -> None:
    found: dict[str, str] = {}
    twice: list[str] = []
    for shard, part in zip(dict.fromkeys(weight_map.values()), parts, strict=True):
        for name in part.names():
            if name in found:
                twice.append(f"{name} in {found[name]} and {shard}")
            found[name] = shard
    if twice:
        raise CheckpointError(f"{index}: tensors that two shards hold:\n{listed(twice)}")
    lost = [f"{n} in {shard}" for n, shard in weight_map.items() if found.get(n) != shard]
    if lost:
        raise CheckpointError(f"{index} names tensors that their shard lacks:\n{listed(lost)}")
    unlisted = found.keys() - weight_map.keys()
    if unlisted:
        raise CheckpointError(
            f"{index} does not name tensors that the shards hold:\n{listed(unlisted)}"
        )


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name → shard, both checked to be text and the shard to lie in the folder."""
    try:
        content: Any = json.loads(index.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise CheckpointError(f"{index} is not a JSON file that can be read: {exc}") from exc
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    for name, shard in weight_map.items():
        # Lexically: a shard in the folder may itself be a link into a download cache.
        if not isinstance(shard, str) or not _stays_inside(shard):
            raise CheckpointError(
                f"{index}: {name} is said to be in {shard!r}, which is not a file of this folder"
            )
    return weight_map


def _stays_inside(shard: str) -> bool:
    path = PurePosixPath(shard)
    return bool(shard) and "\\" not in shard and not path.is_absolute() and ".." not in path.parts
