"""The recipes under models/, by folder name."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

MODELS = Path(__file__).resolve().parents[1] / "models"


def load_recipe(name: str) -> ModuleType:
    """The module models/NAME/make.py, whose folder name need not be an identifier."""
    path = MODELS / name / "make.py"
    spec = importlib.util.spec_from_file_location(f"make_{name.replace('-', '_')}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
