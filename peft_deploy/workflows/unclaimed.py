"""PaddleNLP's model in a folder, whatever its class. Needs Paddle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddlenlp.transformers
from paddle import nn

from peft_deploy.adapters.arrays import assign
from peft_deploy.adapters.lora import LoRAModel
from peft_deploy.base.folder import CONFIG
from peft_deploy.config.json_file import read_object
from peft_deploy.errors import CheckpointError, ConfigError, UnsupportedModelError, listed, nearest
from peft_deploy.progress import Progress
from peft_deploy.weights import Checkpoint, open_checkpoint
from peft_deploy.workflows.sources import name_and_path


def load_unclaimed(
    folder: Path, adapters: Sequence[str], progress: Progress
) -> tuple[nn.Layer, str]:
    """The model of a folder in float32, with the adapter around it if one is given, and the adapter's name.

    Args:
        folder: with a config.json that names the class in ``architectures``, and weights in PaddleNLP's names.
        adapters: at most one LoRA adapter, ``FOLDER`` or ``NAME=FOLDER``, of PaddleNLP's format.
        progress: gets a phase with one unit a tensor.

    Raises:
        CheckpointError: no config.json or weights, or weights that are not the model's.
        AdapterError: the adapter cannot be read, or does not fit.
        ConfigError: more than one adapter.
        UnsupportedModelError: PaddleNLP has no such class, or cannot make the model of this config.json.
    """
    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{folder} has no {CONFIG}, which would name the model's class",
            hint="export a layer in memory instead: peft_deploy.export(layer, output, signature=…)",
        )
    config = read_object(folder / CONFIG, CheckpointError)
    layer = _build(folder / CONFIG, config)
    _fill(layer, open_checkpoint(folder), progress)
    layer.eval()
    if not adapters:
        return layer, ""
    if len(adapters) > 1:
        raise ConfigError(
            f"{len(adapters)} adapters were given; a model that no family knows takes one, merged"
        )
    name, path = name_and_path(adapters[0])
    return LoRAModel.from_pretrained(layer, path), name


def _build(path: Path, config: dict[str, Any]) -> nn.Layer:
    named = config.get("architectures") or []
    name = named[0] if isinstance(named, list) and named else None
    cls = getattr(paddlenlp.transformers, name, None) if isinstance(name, str) else None
    if cls is None or not hasattr(cls, "config_class") or not issubclass(cls, nn.Layer):
        close = nearest(name, dir(paddlenlp.transformers)) if isinstance(name, str) else []
        raise UnsupportedModelError(
            f"{path} names the class {name!r} in architectures, and paddlenlp.transformers has no such model",
            hint=f"the closest is {close[0]}" if close else None,
        )
    try:
        return cls(cls.config_class(**config))
    except Exception as exc:  # PaddleNLP raises whatever its own code raises
        raise UnsupportedModelError(
            f"PaddleNLP cannot make a {name} of {path}: {type(exc).__name__}: {exc}"
        ) from exc


def _fill(layer: nn.Layer, checkpoint: Checkpoint, progress: Progress) -> None:
    """Puts a checkpoint's tensors into the model, every one of them."""
    if checkpoint.metadata.get("format") == "pt":
        raise CheckpointError(
            f"{checkpoint.path} has the layout of torch, with linear weights the other way round",
            hint="load it with PaddleNLP's from_pretrained(convert_from_torch=True) and save it again",
        )
    kept = {*dict(layer.named_parameters()), *layer.state_dict()}
    tensors = {**dict(layer.named_parameters(remove_duplicate=False)), **layer.state_dict()}
    found = set(checkpoint.names())
    missing = {n for n in kept if n not in found and not _stored(n, found, tensors)}
    if missing or found - tensors.keys():
        raise CheckpointError(
            f"{checkpoint.path} does not hold the weights of a {type(layer).__name__}"
            + (f"; missing:\n{listed(missing)}" if missing else "")
            + (
                f"; not expected:\n{listed(found - tensors.keys())}"
                if found - tensors.keys()
                else ""
            ),
            hint="does config.json belong to these weights?",
        )
    progress.phase("Loading the model", len(found), "tensors")
    written: dict[int, str] = {}
    for name in sorted(found):
        tensor, data = tensors[name], checkpoint.read(name)
        if tuple(tensor.shape) != data.shape:
            raise CheckpointError(
                f"{checkpoint.path}: {name} is {list(data.shape)}, the model's is {list(tensor.shape)}"
            )
        first = written.setdefault(id(tensor), name)
        if first != name and not np.array_equal(checkpoint.read(first), data):
            raise CheckpointError(
                f"{checkpoint.path}: the model shares one storage for {first} and {name}; "
                "the two differ in the checkpoint"
            )
        assign(tensor, np.asarray(data))
        progress.advance(1, name)


def _stored(name: str, found: set[str], tensors: dict[str, Any]) -> bool:
    """Whether the tensor is stored under another of its names."""
    return any(tensors[other] is tensors[name] for other in found & tensors.keys())
