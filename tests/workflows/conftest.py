from __future__ import annotations

from pathlib import Path

import pytest
from merge_oracle import write_lora


@pytest.fixture
def tuned(tiny_llama: Path, tmp_path: Path) -> Path:
    write_lora(tmp_path / "tuned", tiny_llama)
    return tmp_path / "tuned"
