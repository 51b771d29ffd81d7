"""Bundles made by a real export, checked against what they were made of, and against something else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from flows_adapter import adapter_for

from peft_deploy.bundle import MANIFEST
from peft_deploy.cli.validate import validate_command
from peft_deploy.errors import AdapterError, BundleError, CheckpointError, OutputError
from peft_deploy.progress import Silent
from peft_deploy.workflows.check_bundle import check_bundle
from peft_deploy.workflows.sources import from_folders
from peft_deploy.workflows.validate import validate

pytestmark = pytest.mark.convert


@pytest.fixture
def disguised_bundle(base_bundle: Path, merged_bundle: Path, tmp_path: Path) -> Path:
    """A bundle without the adapter whose manifest claims it."""
    folder = tmp_path / "disguised"
    shutil.copytree(base_bundle, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["adapters"] = json.loads((merged_bundle / MANIFEST).read_text())["adapters"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def test_a_merged_bundle_is_what_was_trained(
    merged_bundle: Path, tiny_llama: Path, tiny_adapter: Path
) -> None:
    report = validate(merged_bundle, tiny_llama, adapter=tiny_adapter)
    assert report.passed, report.summary()
    assert report.exact and report.real_text and not report.warnings
    assert report.effect is not None and report.effect.sensitivity < 1e-3
    assert report.generation is not None
    assert {len(p.actual) for p in report.generation.prompts} == {32}


def test_a_base_bundle_is_the_base(base_bundle: Path, tiny_llama: Path) -> None:
    report = validate(base_bundle, tiny_llama)
    assert report.passed, report.summary()
    assert report.effect is None


def test_a_bundle_without_the_adapter_fails(
    base_bundle: Path, tiny_llama: Path, tiny_adapter: Path
) -> None:
    source = from_folders(tiny_llama, tiny_adapter)
    model = source.load_reference(Silent())
    report = check_bundle(base_bundle, model, source.family, source.config)
    assert not any(case.passed for case in report.cases)


@pytest.mark.parametrize("factor", [1.01, 0.99])
def test_a_bundle_of_another_strength_fails(
    factor: float, merged_bundle: Path, tiny_llama: Path, tiny_adapter: Path
) -> None:
    source = from_folders(tiny_llama, tiny_adapter)
    model = source.load_reference(Silent())
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.set_value(parameter * factor)
    report = check_bundle(merged_bundle, model, source.family, source.config)
    assert not any(case.passed for case in report.cases)


def test_what_it_was_not_made_of_is_refused(
    base_bundle: Path,
    merged_bundle: Path,
    tiny_llama: Path,
    tiny_adapter: Path,
    make_tiny_llama: Callable[..., Path],
    tmp_path: Path,
) -> None:
    with pytest.raises(AdapterError, match="merged into it, and none was given"):
        validate(merged_bundle, tiny_llama)
    with pytest.raises(AdapterError, match="was made without an adapter"):
        validate(base_bundle, tiny_llama, adapter=tiny_adapter)
    other = adapter_for(tiny_llama, tmp_path / "other", seed=8)
    with pytest.raises(AdapterError, match="other has the fingerprint"):
        validate(merged_bundle, tiny_llama, adapter=other)
    with pytest.raises(CheckpointError, match="was made of the base model"):
        validate(merged_bundle, make_tiny_llama(seed=1), adapter=tiny_adapter)
    with pytest.raises(BundleError, match="is not a bundle"):
        validate(tmp_path, tiny_llama)


def run(*arguments: object) -> tuple[int, str]:
    code, stdout, _ = spoken(*arguments)
    return code, stdout


def spoken(*arguments: object) -> tuple[int, str, str]:
    """With what it says to people."""
    result = CliRunner().invoke(validate_command, [str(a) for a in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_reports_success(
    merged_bundle: Path, tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "report"
    options = ("--base", tiny_llama, "--adapter", tiny_adapter, "--report", folder, "--json")
    code, stdout = run(merged_bundle, *options)
    assert code == 0
    assert json.loads(stdout)["passed"] is True
    full = json.loads((folder / "report.json").read_text())
    assert full["passed"] is True and len(full["cases"][0]["outputs"]) == 5
    assert full["subject"]["name"] == "merged"
    files = ["junit.xml", "report.html", "report.json", "report.md"]
    assert sorted(path.name for path in folder.iterdir()) == files


def test_the_command_exits_with_7(
    disguised_bundle: Path, tiny_llama: Path, tiny_adapter: Path
) -> None:
    options = ("--base", tiny_llama, "--adapter", tiny_adapter, "--json")
    code, stdout, stderr = spoken(disguised_bundle, *options)
    assert code == 7
    assert "--bisect DIR finds" in stderr
    assert json.loads(stdout)["passed"] is False


def test_a_report_that_cannot_be_written_is_an_error(
    base_bundle: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    code, _ = run(base_bundle, "--base", tiny_llama, "--report", tmp_path / "file")
    assert code == OutputError.exit_code
