"""Which format an adapter is in, told by its files and never by its name."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from peft_deploy.adapters.formats.adapter import Adapter
from peft_deploy.adapters.formats.onnx_adapter import read_onnx_adapter
from peft_deploy.adapters.formats.onnx_file import is_onnx_adapter
from peft_deploy.adapters.formats.paddlenlp import read_adapter
from peft_deploy.adapters.formats.peft import read_peft
from peft_deploy.adapters.formats.peft_config import (
    PEFT_CONFIG_NAME,
    PREFIX,
    read_peft_json,
)
from peft_deploy.config import LORA_CONFIG_NAME, PREFIX_CONFIG_NAME
from peft_deploy.errors import AdapterError, listed
from peft_deploy.families.names import NameMap


class AdapterFormat(str, Enum):
    """The formats of adapters, by the names that the command line gives them."""

    PADDLE = "paddle"
    HF = "hf"
    ONNX = "onnx"


class Method(str, Enum):
    """What kind of adapter it is."""

    LORA = "lora"
    PREFIX = "prefix"


_CONFIGS = {
    LORA_CONFIG_NAME: (AdapterFormat.PADDLE, Method.LORA),
    PREFIX_CONFIG_NAME: (AdapterFormat.PADDLE, Method.PREFIX),
    PEFT_CONFIG_NAME: (AdapterFormat.HF, Method.LORA),
}


def detect(path: Path) -> tuple[AdapterFormat, Method]:
    """The format and the method of an adapter.

    A PEFT folder of a method that cannot be read counts as LoRA, whose reader says so.

    Raises:
        AdapterError: nothing there, nothing of an adapter, or more than one.
    """
    if path.is_file() and is_onnx_adapter(path):
        return AdapterFormat.ONNX, Method.LORA
    if not path.is_dir():
        kind = "is no .onnx_adapter file" if path.exists() else "does not exist"
        raise AdapterError(f"the adapter {path} {kind}", hint="give an adapter's folder or file")
    present = [name for name in _CONFIGS if (path / name).is_file()]
    if len(present) != 1:
        raise AdapterError(
            f"{path} holds {'more than one adapter' if present else 'no adapter'}; "
            f"{'found' if present else 'looked for'}:\n{listed(present or _CONFIGS)}"
        )
    format, method = _CONFIGS[present[0]]
    if format is AdapterFormat.HF and read_peft_json(path)["peft_type"] == PREFIX:
        method = Method.PREFIX
    return format, method


def read_lora(
    path: Path,
    names: NameMap,
    *,
    num_layers: int | None = None,
    tied: Mapping[str, str] | None = None,
    model_config: Mapping[str, Any] | None = None,
) -> Adapter:
    """A LoRA adapter of whichever format.

    Args:
        path: the folder or the file.
        names: of the base model's family.
        num_layers: L of the base model.
        tied: PaddleNLP parameter → the one whose storage it shares in this base model.
        model_config: the base model's config.json, by which the files of tensor-parallel ranks are put together.

    Raises:
        AdapterError: there is none, it is damaged, or cannot be represented.
        MissingExtraError: it is an ``.onnx_adapter`` file, and onnxruntime is not installed.
    """
    if path.is_file() and is_onnx_adapter(path):
        return read_onnx_adapter(path, names, num_layers=num_layers)
    if (path / PEFT_CONFIG_NAME).is_file() and not (path / LORA_CONFIG_NAME).is_file():
        return read_peft(path, names, num_layers=num_layers, tied=tied)
    return read_adapter(path, model_config=model_config)
