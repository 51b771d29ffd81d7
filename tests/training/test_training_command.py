from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from peft_deploy.adapters import read_adapter
from peft_deploy.cli import cli

pytestmark = pytest.mark.filterwarnings(r"ignore:[\s\S]*swiglu")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Completions of one token and its end each, so that the mean of means is the mean."""
    path = tmp_path / "train.jsonl"
    lines = [{"prompt": f"{'ab' * i} ", "completion": chr(97 + i)} for i in range(16)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def arguments(base: Path, data: Path, output: Path) -> list[str]:
    given = {"base": base, "data": data, "output": output, "learning-rate": "3e-2", "lora-r": 4}
    return ["train", *(str(w) for key, value in given.items() for w in (f"--{key}", value))]


def test_the_command_trains_resumes_and_prints_its_result(
    tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    command = arguments(tiny_llama, data, tmp_path / "a")
    first = CliRunner().invoke(
        cli, [*command, "--max-steps", "3", "--save-steps", "2", "--target-modules", "q_proj"]
    )
    assert first.exit_code == 0, first.output
    assert "16 examples in 3 steps" in first.stderr
    assert first.stdout == ""
    again = CliRunner().invoke(
        cli, [*command, "--max-steps", "4", "--resume", "--target-modules", "q_proj", "--json"]
    )
    assert again.exit_code == 0, again.output
    result = json.loads(again.stdout)
    assert result["steps"] == 4
    assert result["trained_parameters"] == 2 * (48 * 4 + 4 * 48)
    assert len(read_adapter(tmp_path / "a").state) == 4


def test_a_bad_line_ends_with_exit_code_2(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    data.write_text(data.read_text() + '{"promt": "x"}\n')
    result = CliRunner().invoke(cli, arguments(tiny_llama, data, tmp_path / "a"))
    assert result.exit_code == 2
    assert "line 17" in result.stderr and "'prompt'" in result.stderr
    assert not (tmp_path / "a").exists()


def test_examples_that_were_cut_are_said(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    command = arguments(tiny_llama, data, tmp_path / "a")
    result = CliRunner().invoke(cli, [*command, "--max-steps", "1", "--max-length", "9"])
    assert result.exit_code == 0, result.output
    assert "were cut" in result.stderr
    assert "were left out" in result.stderr


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_with_batches_twice_as_large(
    tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    launch = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2"]
    tool = str(Path(sys.executable).with_name("peft-deploy"))
    steps = ["--max-steps", "3", "--batch-size"]
    done = subprocess.run(
        [
            *(*launch, "--backend", "gloo", "--log_dir", str(tmp_path / "log"), tool),
            *(*arguments(tiny_llama, data, tmp_path / "two"), *steps, "2"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one = CliRunner().invoke(cli, [*arguments(tiny_llama, data, tmp_path / "one"), *steps, "4"])
    assert one.exit_code == 0, one.output
    found, wanted = read_adapter(tmp_path / "two").state, read_adapter(tmp_path / "one").state
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=1e-5)
        assert name.endswith("lora_A") or np.abs(array).max() > 1e-2
