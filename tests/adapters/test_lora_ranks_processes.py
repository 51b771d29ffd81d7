"""Two processes as fleet's tensor-parallel ranks, over gloo: what they save together and read again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from peft_deploy.adapters import read_adapter

SCRIPT = Path(__file__).with_name("save_from_ranks.py")
AXES = {"up.lora_B": 1, "up.bias": 0, "down.lora_A": 0}


@pytest.mark.slow
def test_two_processes_save_one_adapter(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2"]
    log = ["--backend", "gloo", "--log_dir", str(tmp_path / "log")]
    done = subprocess.run(
        [*launch, *log, str(SCRIPT), str(tmp_path), "bfloat16"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert all((tmp_path / f"done-{rank}").exists() for rank in range(2))
    whole = read_adapter(tmp_path / "whole")
    ranks = [read_adapter(tmp_path / "ranks", variant=f"tp0{rank}").state for rank in range(2)]
    assert len(whole.state) == 6
    for name, array in whole.state.items():
        parts = [state[name] for state in ranks]
        axis = AXES.get(name)
        assert np.array_equal(*parts) == (axis is None)
        expected = parts[0] if axis is None else np.concatenate(parts, axis)
        np.testing.assert_array_equal(array, expected)
        assert np.abs(array.astype(np.float64)).max() > 0.5
    assert whole.dtype == "bfloat16"
    assert whole.config.tensor_parallel_degree == -1
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert names == {"lora_model_state.pdparams", "lora_config.json", "peft_deploy_adapter.json"}
