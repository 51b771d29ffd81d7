"""``peft-deploy inspect`` and ``peft-deploy doctor``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from peft_deploy import diagnosis
from peft_deploy.adapters.formats import write_adapter
from peft_deploy.bundle import MANIFEST, Manifest
from peft_deploy.cli import cli
from peft_deploy.config import LoRAConfig
from peft_deploy.diagnosis import Check, Diagnosis, Verdict
from peft_deploy.signature import causal_lm_signature
from peft_deploy.workflows import doctor


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def adapter(folder: Path, B: float) -> Path:
    rng = np.random.default_rng(0)
    name = "llama.layers.{}.mlp.up_proj.lora_{}"
    tensors: dict[str, Any] = {}
    for i in range(4):
        tensors[name.format(i, "A")] = rng.standard_normal((6, 2)).astype(np.float32)
        tensors[name.format(i, "B")] = np.full((2, 5), B, np.float32)
    write_adapter(folder, LoRAConfig(r=2, lora_alpha=6, target_modules=".*up_proj"), tensors)
    return folder


def bundle(folder: Path, **changes: Any) -> Path:
    """A manifest; there is nothing else that it would have to agree with."""
    folder.mkdir()
    signature = causal_lm_signature(num_layers=3, num_kv_heads=2, head_dim=8, vocab_size=67)
    manifest = Manifest(
        versions={"paddlepaddle": "3.3.1"},
        model_type="llama",
        architecture="LlamaForCausalLM",
        signature=signature,
        opset=17,
        precision="fp32",
        base={"name": "some-base", "layout": "huggingface", "fingerprint": "ab" * 32},
        **changes,
    )
    (folder / MANIFEST).write_text(manifest.to_json(), "utf-8")
    return folder


def test_a_checkpoint(tiny_llama: Path) -> None:
    result = run("inspect", tiny_llama)
    assert result.exit_code == 0 and result.stdout == ""
    for fact in (
        "checkpoint",
        "LlamaForCausalLM",
        "2 layers",
        "6 heads",
        "huggingface",
        "float32",
    ):
        assert fact in result.stderr
    data = json.loads(run("inspect", tiny_llama, "--json").stdout)
    assert data["kind"] == "checkpoint"
    assert data["dims"]["num_kv_heads"] == 2


def test_an_adapter(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", 0.5)
    result = run("inspect", folder)
    assert result.exit_code == 0
    assert "llama.layers.*.mlp.up_proj × 4" in result.stderr  # noqa: RUF001
    assert "rank 2" in result.stderr and "[6, 5]" in result.stderr
    assert "untrained" not in result.stderr
    data = json.loads(run("inspect", folder, "--json").stdout)
    assert (data["kind"], data["rank"], data["scaling"]) == ("adapter", 2, 3.0)


def test_an_untrained_adapter_is_called_that(tmp_path: Path) -> None:
    result = run("inspect", adapter(tmp_path / "a", 0.0))
    assert result.exit_code == 0 and "the adapter is untrained" in result.stderr


def test_a_bundle(tmp_path: Path) -> None:
    result = run("inspect", bundle(tmp_path / "b"))
    assert result.exit_code == 0
    for fact in (
        "some-base",
        "opset 17",
        "[batch, sequence, 67]",
        "and the same for 2 more layers",
    ):
        assert fact in result.stderr
    assert "not checked" in result.stderr


def test_a_bundle_that_is_not_whole(tmp_path: Path) -> None:
    folder = bundle(tmp_path / "b", files={"model.onnx": "00"})
    result = run("inspect", folder)
    assert result.exit_code == 6 and "✗ model.onnx is missing" in result.stderr
    result = run("inspect", folder, "--json")
    assert result.exit_code == 6
    assert json.loads(result.stdout)["problems"] == ["model.onnx is missing"]


def test_nothing_of_the_kind(tmp_path: Path) -> None:
    result = run("inspect", tmp_path)
    assert result.exit_code == 3 and result.stdout == ""
    assert "error: " in result.stderr and "Looked for" in result.stderr
    data = json.loads(run("inspect", tmp_path, "--json").stdout)
    assert data["error"] == "CheckpointError"


def test_doctor_without_the_conversion() -> None:
    result = run("doctor", "--no-convert")
    assert result.stdout == ""
    assert "✓ Python: " in result.stderr and "✓ run on cpu: " in result.stderr
    assert "tiny conversion" not in result.stderr
    result = run("doctor", "--no-convert", "--json")
    data = json.loads(result.stdout)
    assert data["packages"]["click"] and data["extras"]["base"] is True
    assert result.exit_code == (0 if data["passed"] else 2)


@pytest.mark.parametrize("code", [2, 5, 7])
def test_doctor_ends_with_the_code_of_what_failed(
    monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def diagnose(found: Diagnosis, **_: object) -> Diagnosis:
        check = Check("a job", Verdict.FAILED, "it [broke]", "mend it", exit_code=code)
        return Diagnosis(found.machine, found.packages, found.extras, (check,))

    monkeypatch.setattr(doctor, "diagnose", diagnose)
    result = run("doctor")
    assert result.exit_code == code
    assert "✗ a job: it [broke]" in result.stderr and "→ mend it" in result.stderr


def test_doctor_where_the_base_install_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_machine() -> Diagnosis:
        found = original()
        check = Check(diagnosis.BASE_INSTALL, Verdict.FAILED, "numpy cannot be imported", "mend")
        return Diagnosis(found.machine, found.packages, found.extras, (check,))

    def never(*_: object, **__: object) -> Diagnosis:
        raise AssertionError("nothing can be run there")

    original = diagnosis.check_machine
    monkeypatch.setattr(diagnosis, "check_machine", check_machine)
    monkeypatch.setattr(doctor, "diagnose", never)
    result = run("doctor")
    assert result.exit_code == 2 and "✗ base install: numpy" in result.stderr
