"""PEFT folders and ``.onnx_adapter`` files, inspected without their base model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from peft_deploy.adapters.formats.onnx_file import write_onnx_adapter
from peft_deploy.cli import cli
from peft_deploy.errors import AdapterError
from peft_deploy.inspection import AdapterInspection, Kind, inspect, kind_of

Q, V = (f"model.layers.{{}}.self_attn.{name}" for name in ("q_proj", "v_proj"))


def arrays(rank: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(rank)
    A, B = generator.standard_normal((8, rank)), generator.uniform(1, 2, (rank, 6))
    return A.astype(np.float32), B.astype(np.float32)


@pytest.fixture
def peft(tmp_path: Path) -> Path:
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 6,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"v_proj": 2},
        "base_model_name_or_path": "some/base",
    }
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for module, rank in ((Q.format(0), 4), (Q.format(1), 4), (V.format(0), 2), (V.format(1), 2)):
        A, B = arrays(rank)
        tensors[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(A.T)
        tensors[f"base_model.model.{module}.lora_B.weight"] = np.ascontiguousarray(B.T)
    save_file(tensors, tmp_path / "peft" / "adapter_model.safetensors")
    return tmp_path / "peft"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    A, B = arrays(3)
    names = [f"{Q.format(0)}.lora_{half}.weight" for half in "AB"]
    return write_onnx_adapter(
        tmp_path / "a.onnx_adapter", dict(zip(names, (A, B), strict=True)), 9
    )


def test_a_peft_folder(peft: Path) -> None:
    for path in (peft, peft / "adapter_config.json", peft / "adapter_model.safetensors"):
        found = inspect(path)
        assert isinstance(found, AdapterInspection)
        assert (found.format, found.rank, found.ranks, found.modules) == ("hf", 4, (2, 4), 4)
        assert (found.base_name, found.scaling, found.dropout) == ("some/base", 1.5, 0.1)
    largest = {group.pattern: group.largest for group in found.targets}
    for pattern, rank, scaling in ((Q, 4, 6 / 4), (V, 2, 6 / 2)):
        A, B = arrays(rank)
        norm = np.linalg.norm(scaling * A.astype(np.float64) @ B)
        assert largest[pattern.format("*")] == pytest.approx(norm)
    assert [f.name for f in found.files] == ["adapter_config.json", "adapter_model.safetensors"]


def test_an_onnx_adapter_file(file: Path) -> None:
    assert kind_of(file) == (Kind.ADAPTER, file)
    found = inspect(file)
    assert isinstance(found, AdapterInspection)
    assert (found.format, found.rank, found.scaling) == ("onnx", 3, 1.0)
    assert found.base_name == "model_version 9"
    A, B = arrays(3)
    assert found.norm == pytest.approx(np.linalg.norm(A.astype(np.float64) @ B))
    assert found.files[0].bytes == file.stat().st_size


def test_the_command(peft: Path, file: Path) -> None:
    shown = CliRunner().invoke(cli, ["inspect", str(peft)])
    assert shown.exit_code == 0, shown.stderr
    for part in ("Hugging Face PEFT's", "rank 2, 4", "patterns q_proj, v_proj", "some/base"):
        assert part in shown.stderr
    shown = CliRunner().invoke(cli, ["inspect", str(file), "--json"])
    assert json.loads(shown.stdout)["format"] == "onnx"
    shown = CliRunner().invoke(cli, ["inspect", str(file)])
    assert "onnxruntime's (.onnx_adapter)" in shown.stderr


def test_peft_prefixes_need_their_base(peft: Path) -> None:
    (peft / "adapter_config.json").write_text('{"peft_type": "PREFIX_TUNING"}')
    with pytest.raises(AdapterError, match="holds a PEFT prefix"):
        inspect(peft)
