"""A bundle that holds what its reference said: checked again without Paddle and without the base model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import peft_deploy
from peft_deploy.bundle import MANIFEST
from peft_deploy.cli.validate import validate_command
from peft_deploy.config.export import ExportOptions
from peft_deploy.errors import BundleError, ConfigError
from peft_deploy.parity.own_cases import GROUP
from peft_deploy.workflows.validate import validate

pytestmark = pytest.mark.convert

RECORDED = "reference/0-bundle.safetensors"


@pytest.fixture
def copy(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "copy"))


def test_it_passes_without_a_base(recorded: Path) -> None:
    report = validate(recorded)
    assert report.passed, report.summary()
    assert report.effect is not None and report.exact and report.real_text
    own = [case for case in report.cases if case.group == GROUP]
    assert len(own) == 4
    assert report.generation is not None
    assert report.generation.prompts[-1].prompt == "and"
    assert (recorded / RECORDED).stat().st_size < 2_000_000


def test_the_export_wrote_its_report(recorded: Path) -> None:
    data = json.loads((recorded.parent / "report" / "report.json").read_text())
    manifest = json.loads((recorded / MANIFEST).read_text())
    assert data["passed"] and data["subject"]["name"] == "out"
    assert data["subject"]["files"] == manifest["files"]
    assert RECORDED in manifest["files"]


def test_no_paddle_is_needed(recorded: Path) -> None:
    script = (
        "import sys\n"
        "for name in ('paddle', 'paddlenlp', 'onnx', 'paddle2onnx'): sys.modules[name] = None\n"
        f"import peft_deploy; report = peft_deploy.validate({str(recorded)!r})\n"
        "print(report.passed, len(report.cases))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.startswith("True "), done.stderr


def test_other_weights_fail(copy: Path, base_bundle: Path) -> None:
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copyfile(base_bundle / name, copy / name)
    report = validate(copy)
    assert not any(case.passed for case in report.cases)
    result = CliRunner().invoke(validate_command, [str(copy), "--report", str(copy / "r")])
    assert result.exit_code == 7
    assert "Failed" in (copy / "r" / "report.html").read_text()


def test_a_reference_that_was_changed_is_refused(copy: Path) -> None:
    file = copy / RECORDED
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleError, match="not the one that the manifest describes") as caught:
        validate(copy)
    assert RECORDED in caught.value.message
    file.unlink()
    with pytest.raises(BundleError, match="is missing, or not the one"):
        validate(copy)


def test_without_a_recording_a_base_is_needed(merged_bundle: Path) -> None:
    with pytest.raises(BundleError, match="holds no recorded reference") as caught:
        validate(merged_bundle)
    assert caught.value.hint is not None and "--record-reference" in caught.value.hint


def test_what_belongs_to_a_base_is_refused(recorded: Path, tiny_adapter: Path) -> None:
    cases = recorded.parent / "cases.txt"
    for options in ({"adapter": tiny_adapter}, {"seed": 1}, {"cases": cases}):
        with pytest.raises(ConfigError, match="can only be used with the base model"):
            validate(recorded, **options)  # type: ignore[arg-type]


def test_cases_count_with_a_base_too(
    merged_bundle: Path, tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "cases.jsonl").write_text('{"ids": [5, 6, 7, 8, 9]}\n')
    report = validate(
        merged_bundle, tiny_llama, adapter=tiny_adapter, cases=tmp_path / "cases.jsonl"
    )
    assert report.passed
    assert next(c.name for c in report.cases if c.group == GROUP) == "prompt 1: 5 tokens"
    (tmp_path / "cases.jsonl").write_text('{"ids": [5, 100000]}\n')
    with pytest.raises(ConfigError, match="has the token 100000"):
        validate(merged_bundle, tiny_llama, adapter=tiny_adapter, cases=tmp_path / "cases.jsonl")


def test_cases_that_cannot_be_used_are_found_before_the_work(
    tiny_llama: Path, tmp_path: Path
) -> None:
    options = ExportOptions(cases=tmp_path / "missing.txt")
    with pytest.raises(ConfigError, match=r"missing\.txt cannot be read"):
        peft_deploy.export(tiny_llama, tmp_path / "out", options=options)
    assert list(tmp_path.iterdir()) == []
    for wrong in ({"cases": tmp_path}, {"record_reference": True}, {"report": tmp_path}):
        with pytest.raises(ConfigError, match="needs the check that --no-validate leaves out"):
            ExportOptions(validate=False, **wrong)  # type: ignore[arg-type]
