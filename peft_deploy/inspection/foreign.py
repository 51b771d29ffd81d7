"""The facts about adapters in other formats than PaddleNLP's, under the names that their files use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from peft_deploy.adapters.formats.detect import AdapterFormat
from peft_deploy.adapters.formats.onnx_adapter import onnx_pairs
from peft_deploy.adapters.formats.onnx_file import is_onnx_adapter, read_onnx_file
from peft_deploy.adapters.formats.peft_config import PEFT_CONFIG_NAME, PREFIX, read_peft_json
from peft_deploy.adapters.formats.peft_files import PEFT_WEIGHTS_NAME, read_peft_lora
from peft_deploy.adapters.provenance import Provenance, describe
from peft_deploy.config import LORA_CONFIG_NAME
from peft_deploy.errors import AdapterError
from peft_deploy.inspection.adapter import AdapterInspection, delta_norm, target_groups
from peft_deploy.inspection.tensors import TensorTotals, file_sizes, info_of
from peft_deploy.weights import Array, LoraPair


def is_foreign(path: Path) -> bool:
    """Whether an ``.onnx_adapter`` file or a PEFT folder lies at a path."""
    if path.is_dir():
        return (path / PEFT_CONFIG_NAME).is_file() and not (path / LORA_CONFIG_NAME).is_file()
    return is_onnx_adapter(path)


def inspect_foreign(path: Path) -> AdapterInspection:
    """The facts about a PEFT LoRA folder or an ``.onnx_adapter`` file.

    Raises:
        AdapterError: a damaged one, one of another method, or NaN or infinity in it.
        MissingExtraError: for the file, onnxruntime is not installed.
    """
    return _inspect_peft(path) if path.is_dir() else _inspect_onnx(path)


def _inspect_peft(folder: Path) -> AdapterInspection:
    if read_peft_json(folder)["peft_type"] == PREFIX:
        raise AdapterError(
            f"{folder} holds a PEFT prefix, whose heads only the base model tells",
            hint="convert it with peft-deploy adapter convert --to paddle, and inspect that",
        )
    peft = read_peft_lora(folder)
    config = peft.config
    targets = config.target_modules
    return _inspection(
        folder,
        AdapterFormat.HF,
        peft.pairs,
        peft.tensors,
        files=[folder / name for name in (PEFT_CONFIG_NAME, PEFT_WEIGHTS_NAME)],
        method="lora (rslora)" if config.use_rslora else "lora",
        rank=config.r,
        alpha=config.lora_alpha,
        scaling=config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r),
        dropout=config.lora_dropout,
        base_name=config.base_name,
        target_modules=(targets,) if isinstance(targets, str) else targets,
        trainable_modules=config.modules_to_save,
    )


def _inspect_onnx(path: Path) -> AdapterInspection:
    file = read_onnx_file(path)
    pairs = onnx_pairs(file)
    largest = max(pair.rank for pair in pairs.values())
    base = f"model_version {file.model_version}" if file.model_version else None
    return _inspection(
        path,
        AdapterFormat.ONNX,
        pairs,
        {},
        files=[path],
        method="lora",
        rank=largest,
        alpha=float(largest),  # the scaling is in B
        scaling=1.0,
        dropout=0.0,
        base_name=base,
        target_modules=(),
        trainable_modules=(),
    )


def _inspection(
    path: Path,
    format: AdapterFormat,
    pairs: Mapping[str, LoraPair],
    replaced: Mapping[str, Array],
    *,
    files: list[Path],
    method: str,
    rank: int,
    alpha: float,
    scaling: float,
    dropout: float,
    base_name: str | None,
    target_modules: tuple[str, ...],
    trainable_modules: tuple[str, ...],
) -> AdapterInspection:
    norms = {module: delta_norm(pair) for module, pair in pairs.items()}
    infos = [info_of(name, array) for name, array in replaced.items()]
    stored = [info_of(f"{m}.{h}", getattr(p, h)) for m, p in pairs.items() for h in ("A", "B")]
    return AdapterInspection(
        path=path,
        method=method,
        rank=rank,
        alpha=float(alpha),
        scaling=scaling,
        dropout=dropout,
        base_name=base_name,
        target_modules=target_modules,
        trainable_modules=trainable_modules,
        trainable_bias=None,
        targets=target_groups(pairs, norms),
        replaced=tuple(infos),
        stored=TensorTotals.of(stored + infos),
        files=file_sizes(files, path if path.is_dir() else path.parent),
        norm=math.sqrt(sum(norm * norm for norm in norms.values())),
        fingerprint=None,
        provenance=describe(Provenance.load(path)) if path.is_dir() else None,
        format=format.value,
        ranks=tuple(sorted({pair.rank for pair in pairs.values()})),
    )
