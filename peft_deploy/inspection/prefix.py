"""The facts about a prefix's files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peft_deploy.adapters.formats.pre_caches import PRE_CACHES_NAME
from peft_deploy.adapters.formats.prefix import PREFIX_WEIGHT_FILES, read_prefix
from peft_deploy.adapters.provenance import describe
from peft_deploy.inspection.tensors import FileSize, TensorTotals, file_sizes, info_of


@dataclass(frozen=True)
class PrefixInspection:
    """A prefix on disk; reading it has checked its shapes, and that every value is finite.

    Args:
        path: the folder, or the file of an evaluated prefix.
        method: ``prefix``, or ``prefix (projection)`` when an MLP makes keys and values, or ``prefix (evaluated)``
            when only keys and values are left.
        num_tokens: P.
        num_layers: L of the base model.
        num_kv_heads: K of the base model.
        head_dim: D of the base model.
        projection_size: the width inside the projection; None without one.
        dropout: while training; None for an evaluated prefix.
        stored: what the file holds.
        files: the prefix's files.
        cache_bytes: what keys and values of one sequence take, 2·L·K·P·D elements.
        norm: Frobenius norm of all keys and values together.
        pre_caches: whether pre_caches.npy is there; it has been compared with the weights then.
        fingerprint: identifies the prefix.
        provenance: what the folder says of its origin; None when it says nothing.
        base_name: what the file of an evaluated prefix says of the base model.
        position_offset: what an evaluated prefix adds to the positions of a text.
    """

    path: Path
    method: str
    num_tokens: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    projection_size: int | None
    dropout: float | None
    stored: TensorTotals
    files: tuple[FileSize, ...]
    cache_bytes: int
    norm: float
    pre_caches: bool
    fingerprint: str
    provenance: Mapping[str, Any] | None
    base_name: str | None = None
    position_offset: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {"kind": "prefix", **asdict(self), "path": str(self.path), "finite": True}


def inspect_prefix(folder: Path) -> PrefixInspection:
    """The facts about a prefix's folder.

    Raises:
        AdapterError: no prefix, a damaged one, or NaN or infinity in it.
        ConfigError: a configuration that cannot be used.
    """
    prefix = read_prefix(folder)
    projection = prefix.config.prefix_projection
    caches = prefix.pre_caches()
    size = prefix.config.prefix_projection_hidden_size or prefix.config.hidden_size
    return PrefixInspection(
        path=folder,
        method="prefix (projection)" if projection else "prefix",
        num_tokens=prefix.num_tokens,
        num_layers=prefix.num_layers,
        num_kv_heads=prefix.num_kv_heads,
        head_dim=prefix.head_dim,
        projection_size=size if projection else None,
        dropout=prefix.config.prefix_dropout,
        stored=TensorTotals.of(info_of(name, array) for name, array in prefix.state.items()),
        files=file_sizes(_files(folder), folder),
        cache_bytes=int(caches.nbytes),
        norm=float(np.linalg.norm(caches.astype(np.float64))),
        pre_caches=(folder / PRE_CACHES_NAME).is_file(),
        fingerprint=prefix.fingerprint,
        provenance=describe(prefix.provenance),
    )


def _files(folder: Path) -> list[Path]:
    """Configuration, weights and caches; a training's other files in the folder are not the prefix's."""
    names = (*PREFIX_WEIGHT_FILES, PRE_CACHES_NAME)
    ours = (".json", ".safetensors")
    return sorted(
        p for p in folder.iterdir() if p.is_file() and (p.name in names or p.suffix in ours)
    )
