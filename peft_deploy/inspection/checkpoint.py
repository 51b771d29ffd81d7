"""The facts about a base model's files."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft_deploy.base import BaseModel, open_base
from peft_deploy.base.folder import CONFIG, companions_in
from peft_deploy.config.json_file import read_object
from peft_deploy.errors import CheckpointError, UnsupportedModelError
from peft_deploy.families import ModelDims, NameMap, find_family, known_architectures
from peft_deploy.inspection.tensors import FileSize, TensorTotals, file_sizes
from peft_deploy.signature import LOGITS
from peft_deploy.weights import CanonicalTensors, Checkpoint, open_checkpoint


@dataclass(frozen=True)
class CheckpointInspection:
    """A base model on disk, or the weights of one.

    Args:
        path: the folder, or the file of weights.
        container: ``safetensors`` or ``pdparams``.
        files: the files that hold tensors.
        companions: tokenizer and generation files beside them.
        stored: what the files hold.
        model: the same without what is stored twice or carries no weight: the model's own
            parameters; None when no registered family claims it.
        layout: ``huggingface`` or ``paddlenlp``, as the names show; None when they fit no
            registered family.
        model_type: config.json's; None without one.
        architectures: config.json's.
        dims: sizes; None when no registered family claims the model.
        tied: whether the output layer shares the embedding; None without a config.json.
        fingerprint: identifies the weights in whatever form they are stored; None without a family.
        unsupported: why the model cannot be exported; None when a family claims it.
    """

    path: Path
    container: str
    files: tuple[FileSize, ...]
    companions: tuple[str, ...]
    stored: TensorTotals
    model: TensorTotals | None = None
    layout: str | None = None
    model_type: str | None = None
    architectures: tuple[str, ...] = ()
    dims: ModelDims | None = None
    tied: bool | None = None
    fingerprint: str | None = None
    unsupported: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {"kind": "checkpoint", **asdict(self), "path": str(self.path)}


def inspect_checkpoint(path: Path) -> CheckpointInspection:
    """The facts about a base model's folder, or about a single file of weights.

    Of the weights no more is read than the sample that the fingerprint is made of, and a stored
    copy of a tied matrix.

    Raises:
        CheckpointError: no weights, damaged ones, or ones that are not of the model that
            config.json describes.
    """
    if path.is_dir() and (path / CONFIG).is_file():
        return _with_config(path)
    checkpoint = open_checkpoint(path)
    tensors = _fitting(checkpoint)
    return CheckpointInspection(
        **_files(path, checkpoint),
        model=None if tensors is None else _totals(tensors),
        layout=None if tensors is None else tensors.layout,
    )


def _with_config(folder: Path) -> CheckpointInspection:
    config = read_object(folder / CONFIG, CheckpointError)
    known: dict[str, Any] = {
        "model_type": config.get("model_type"),
        "architectures": tuple(config.get("architectures") or ()),
        "tied": bool(config.get("tie_word_embeddings")),
    }
    try:
        base = open_base(folder)
    except UnsupportedModelError as exc:
        checkpoint = open_checkpoint(folder)
        return CheckpointInspection(**_files(folder, checkpoint), **known, unsupported=exc.message)
    tensors = base.tensors
    known["tied"] = _tied(base)
    return CheckpointInspection(
        **_files(folder, open_checkpoint(folder)),
        **known,
        model=_totals(tensors),
        layout=tensors.layout,
        dims=base.dims,
        fingerprint=base.fingerprint,
    )


def _tied(base: BaseModel) -> bool | None:
    """Whether the output layer shares the embedding; None for a model that gives no scores of the vocabulary."""
    outputs = base.family.signature(base.config).outputs
    scores = [spec for spec in outputs if spec.name == LOGITS]
    if not any(spec.dims[-1] == base.dims.vocab_size for spec in scores):
        return None
    return bool(base.family.tied(base.config))


def _fitting(checkpoint: Checkpoint) -> CanonicalTensors | None:
    """The weights in the terms of the registered family that knows most of their names."""

    def known(names: NameMap) -> int:
        return sum(
            bool(names.to_paddle(n) or names.to_huggingface(n) or names.parts(n))
            for n in checkpoint.names()
        )

    configs: list[dict[str, Any]] = [{"architectures": [name]} for name in known_architectures()]
    maps = [find_family(config).names(config) for config in configs]
    best = max(maps, key=known)
    return CanonicalTensors(checkpoint, best, {}) if known(best) else None


def _files(path: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    folder = path if path.is_dir() else path.parent
    companions = companions_in(folder) if path.is_dir() else []
    return {
        "path": path,
        "container": checkpoint.format,
        "files": file_sizes(checkpoint.files, folder),
        "companions": tuple(file.name for file in companions),
        "stored": TensorTotals.of(checkpoint.info(name) for name in checkpoint.names()),
    }


def _totals(tensors: CanonicalTensors) -> TensorTotals:
    return TensorTotals.of(tensors.info(name) for name in tensors.names())
