"""python -m peers.make_adapter BASE FOLDER RANK: a LoRA adapter on all linear layers, A and B random."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from peers.contenders import ADAPTER_SPREAD, ROOT


def main() -> None:
    """The command line."""
    base, folder, rank = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    spec = importlib.util.spec_from_file_location("make_tiny", ROOT / "models/tiny/make.py")
    assert spec is not None and spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    recipe.make_lora(folder, base, rank=rank, seed=rank, spread=ADAPTER_SPREAD)


if __name__ == "__main__":
    main()
