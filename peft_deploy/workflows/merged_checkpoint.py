"""A merged checkpoint: which base models it can be made of, its config.json, and the check of what was written."""

from __future__ import annotations

from typing import Any

import numpy as np

from peft_deploy.base import BaseModel
from peft_deploy.errors import CheckpointError, listed
from peft_deploy.progress import Progress
from peft_deploy.weights import FLOATING, Array, TensorSource
from peft_deploy.weights.blocks import contiguous, row_blocks
from peft_deploy.weights.canonical import HUGGINGFACE, PADDLENLP


def check_known(model: BaseModel) -> None:
    """Passes when every tensor of a base model is one of its family's; others would be carried along unseen.

    Raises:
        CheckpointError: some are not; they are named.
    """
    names = model.names
    unknown = [name for name in model.tensors.names() if names.to_huggingface(name) is None]
    if unknown:
        raise CheckpointError(
            f"{model.path} holds tensors that a {model.family.paddle_model(model.config)} does not have:\n"
            f"{listed(unknown)}",
            hint="does config.json belong to these weights?",
        )


def verify(written: BaseModel, merged: TensorSource, layout: str, progress: Progress) -> None:
    """Reads a checkpoint back as any later job would and compares it with what it has to hold.

    Args:
        written: the checkpoint.
        merged: the tensors that it has to hold, in PaddleNLP's names and layout.
        layout: that it has to be in.
        progress: its phase counts bytes.

    Raises:
        CheckpointError: another layout or type, other names or shapes, or a single bit that differs.
    """
    tensors = written.tensors
    if tensors.layout != layout:
        raise CheckpointError(
            f"{written.path} was written in {layout} layout and reads as {tensors.layout}"
        )
    wrong = [f"{name} is missing or extra" for name in set(tensors.names()) ^ set(merged.names())]
    for name in merged.names() if not wrong else ():
        if tensors.info(name) != merged.info(name):
            wrong.append(f"{name}: {tensors.info(name)} in place of {merged.info(name)}")
        elif not same_bits(tensors.read(name), merged.read(name)):
            wrong.append(f"{name} holds other values")
        progress.advance(merged.info(name).nbytes, name)
    if wrong:
        raise CheckpointError(
            f"what was written to {written.path} is not what was merged:\n{listed(wrong)}",
            hint="is the disk sound? Did something change the base model or the adapter meanwhile?",
        )


def same_bits(first: Array, second: Array) -> bool:
    """Whether two arrays of one type and shape are equal byte for byte, whatever their memory order."""
    first, second = np.atleast_1d(first), np.atleast_1d(second)
    return all(
        contiguous(first[rows]).tobytes() == contiguous(second[rows]).tobytes()
        for rows in row_blocks(first.shape, first.itemsize)
    )


def main_dtype(tensors: TensorSource) -> str:
    """The floating-point type that most of the data is in."""
    sizes: dict[str, int] = {}
    for info in map(tensors.info, tensors.names()):
        if info.dtype in FLOATING:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    if not sizes:
        raise CheckpointError("the base model holds no floating-point tensor")
    return max(sizes, key=lambda dtype: sizes[dtype])


def merged_config(model: BaseModel, layout: str, dtype: str) -> dict[str, Any]:
    """config.json of the merged checkpoint: the base model's own, or in the other library's words.

    Both libraries load weights in the type that it names, so it has to be that of the weights.
    """
    family = model.family
    if layout == HUGGINGFACE:
        same = model.tensors.layout == HUGGINGFACE
        config = dict(model.config) if same else family.huggingface_config(model.config)
        if "dtype" in config:  # what newer releases of transformers write and prefer
            config["dtype"] = dtype
        return {**config, "torch_dtype": dtype}
    if model.tensors.layout == PADDLENLP:
        config = dict(model.config)
    else:
        config = {
            "architectures": [family.paddle_model(model.config)],
            "model_type": family.model_type,
            "use_cache": True,
            **family.paddle_arguments(model.config),
        }
    config.pop("torch_dtype", None)  # PaddleNLP would prefer it
    return {**config, "dtype": dtype}
