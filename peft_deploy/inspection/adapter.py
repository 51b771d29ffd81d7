"""The facts about an adapter's files."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peft_deploy.adapters.formats import read_adapter
from peft_deploy.adapters.formats.paddlenlp import WEIGHT_FILES
from peft_deploy.adapters.formats.ranks import RANK_FILE
from peft_deploy.adapters.provenance import describe
from peft_deploy.inspection.tensors import FileSize, TensorTotals, file_sizes, info_of
from peft_deploy.weights import LoraPair, TensorInfo


@dataclass(frozen=True)
class TargetGroup:
    """Adapted modules that differ only in the numbers in their names.

    Args:
        pattern: their name, ``*`` for each number.
        count: how many.
        shapes: of the weights they change, [in, out]; one unless the layers differ.
        smallest: the smallest Frobenius norm of scaling · A · B among them.
        largest: the largest.
        unchanged: modules whose scaling · A · B is exactly zero.
    """

    pattern: str
    count: int
    shapes: tuple[tuple[int, int], ...]
    smallest: float
    largest: float
    unchanged: int


@dataclass(frozen=True)
class AdapterInspection:
    """An adapter on disk; reading it has checked that every value is finite.

    Args:
        path: the folder.
        method: ``lora``, or ``lora (rslora)``, ``lora (pissa)``.
        rank: R.
        alpha: numerator of the scaling.
        scaling: what A · B is multiplied by.
        dropout: while training.
        base_name: what the configuration says of the base model.
        target_modules: the configuration's patterns.
        trainable_modules: the configuration's patterns of what is saved whole.
        trainable_bias: the configuration's.
        targets: the adapted modules, grouped.
        replaced: the tensors that take the place of the base's.
        stored: what the file holds.
        files: the adapter's files.
        norm: Frobenius norm of all changes scaling · A · B together.
        fingerprint: identifies the adapter, scaling included; None where only the base model tells the names
            of its modules that it is made of.
        provenance: what the folder says of its origin; None when it says nothing.
        format: ``paddle``, ``hf`` or ``onnx``.
        ranks: all ranks that modules have, ascending.
    """

    path: Path
    method: str
    rank: int
    alpha: float
    scaling: float
    dropout: float
    base_name: str | None
    target_modules: tuple[str, ...]
    trainable_modules: tuple[str, ...]
    trainable_bias: str | None
    targets: tuple[TargetGroup, ...]
    replaced: tuple[TensorInfo, ...]
    stored: TensorTotals
    files: tuple[FileSize, ...]
    norm: float
    fingerprint: str | None
    provenance: Mapping[str, Any] | None
    format: str = "paddle"
    ranks: tuple[int, ...] = ()

    @property
    def modules(self) -> int:
        """How many modules are adapted."""
        return sum(group.count for group in self.targets)

    @property
    def unchanged(self) -> int:
        """Adapted modules that the adapter leaves exactly as they were."""
        return sum(group.unchanged for group in self.targets)

    @property
    def untrained(self) -> bool:
        """Whether the adapter changes nothing: every A · B is zero, and nothing is replaced."""
        return self.unchanged == self.modules and not self.replaced

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        own = {
            "path": str(self.path),
            "finite": True,
            "modules": self.modules,
            "unchanged": self.unchanged,
            "untrained": self.untrained,
        }
        return {"kind": "adapter", **asdict(self), **own}


def inspect_adapter(folder: Path) -> AdapterInspection:
    """The facts about an adapter's folder.

    Raises:
        AdapterError: no adapter, a damaged one, or NaN or infinity in it.
        ConfigError: a configuration that cannot be used.
    """
    adapter = read_adapter(folder)
    config = adapter.config
    norms = {module: delta_norm(pair) for module, pair in adapter.pairs.items()}
    variant = " (pissa)" if config.pissa else " (rslora)" if config.rslora else ""
    return AdapterInspection(
        path=folder,
        method=f"lora{variant}",
        rank=config.r,
        alpha=float(config.lora_alpha),
        scaling=config.scaling,
        dropout=config.lora_dropout,
        base_name=config.base_model_name_or_path,
        target_modules=tuple(config.target_patterns),
        trainable_modules=tuple(config.trainable_patterns),
        trainable_bias=config.trainable_bias,
        targets=target_groups(adapter.pairs, norms),
        replaced=tuple(info_of(name, array) for name, array in adapter.replacements.items()),
        stored=TensorTotals.of(info_of(name, array) for name, array in adapter.state.items()),
        files=file_sizes(_files(folder), folder),
        norm=math.sqrt(sum(norm * norm for norm in norms.values())),
        fingerprint=adapter.fingerprint,
        provenance=describe(adapter.provenance),
        ranks=tuple(sorted({pair.rank for pair in adapter.pairs.values()})),
    )


def delta_norm(pair: LoraPair) -> float:
    """The Frobenius norm of scaling · A · B, without computing A · B.

    ‖A·B‖² is the sum over the elementwise product of the R × R matrices Aᵀ·A and B·Bᵀ; float64.
    """
    A, B = pair.A.astype(np.float64), pair.B.astype(np.float64)  # [in, R], [R, out]
    square = float(np.sum((A.T @ A) * (B @ B.T)))
    return abs(pair.scaling) * math.sqrt(max(0.0, square))


def grouped_name(module: str) -> str:
    """The module's name with ``*`` for each part that is a number."""
    return ".".join("*" if part.isdigit() else part for part in module.split("."))


def target_groups(
    pairs: Mapping[str, LoraPair], norms: Mapping[str, float]
) -> tuple[TargetGroup, ...]:
    """The modules, grouped by :func:`grouped_name`, with the norms of their changes."""
    members: dict[str, list[str]] = defaultdict(list)
    for module in pairs:
        members[grouped_name(module)].append(module)
    return tuple(
        TargetGroup(
            pattern=pattern,
            count=len(modules),
            shapes=tuple(sorted({pairs[m].shape for m in modules})),
            smallest=min(norms[m] for m in modules),
            largest=max(norms[m] for m in modules),
            unchanged=sum(norms[m] == 0 for m in modules),
        )
        for pattern, modules in members.items()
    )


def _files(folder: Path) -> list[Path]:
    """Configuration and weights; a training's other files in the folder are none of the adapter's."""
    ours = (".json", ".safetensors")
    return sorted(
        p
        for p in folder.iterdir()
        if p.is_file()
        and (p.name in WEIGHT_FILES or p.suffix in ours or RANK_FILE.fullmatch(p.name))
    )
