"""``adapters/<name>.onnx_adapter``: the adapters that a bundle keeps apart from its weights."""

from __future__ import annotations

from pathlib import Path

ADAPTER_FOLDER = "adapters"
ADAPTER_SUFFIX = ".onnx_adapter"


def adapter_path(bundle: Path, name: str) -> Path:
    """Where a bundle keeps the adapter of that name."""
    return bundle / ADAPTER_FOLDER / f"{name}{ADAPTER_SUFFIX}"
