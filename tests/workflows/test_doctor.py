"""The doctor's small jobs: a graph on each provider, a conversion from end to end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from peft_deploy.adapters.formats import read_adapter
from peft_deploy.base import open_base
from peft_deploy.diagnosis import Check, Diagnosis, Verdict, check_machine
from peft_deploy.errors import ConverterCrashError, ExecutionError, ParityError
from peft_deploy.progress import Silent
from peft_deploy.runtime import OnnxRunner
from peft_deploy.weights import lora_delta
from peft_deploy.workflows import doctor
from peft_deploy.workflows.export import ExportResult
from peft_deploy.workflows.trial_model import write_base, write_lora


@pytest.fixture(scope="module")
def machine() -> Diagnosis:
    return check_machine()


def conversion(machine: Diagnosis) -> Check:
    return doctor.conversion_check(machine, Silent())


@pytest.mark.convert
def test_the_conversion_passes_here(machine: Diagnosis) -> None:
    check = conversion(machine)
    assert check.verdict is Verdict.PASSED, check.detail
    assert "verified bundle" in check.detail


def test_the_trial_adapter_is_far_from_zero(tmp_path: Path) -> None:
    write_base(tmp_path / "base", 1)
    base = open_base(tmp_path / "base")
    write_lora(tmp_path / "adapter", base, 2)
    adapter = read_adapter(tmp_path / "adapter")
    assert len(adapter.pairs) == 14  # every linear layer but the head
    for module, pair in adapter.pairs.items():
        weight = base.tensors.read(f"{module}.weight")
        assert np.linalg.norm(lora_delta(pair)) > 0.1 * np.linalg.norm(weight)


def test_the_trial_model_depends_on_its_seed_alone(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_base(tmp_path / name, seed)
    a, b, c = (open_base(tmp_path / name).fingerprint for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConverterCrashError("it died", hint="look"), 5),
        (ParityError("it differs"), 7),
        (ImportError("cannot import name 'x' from 'datasets'"), 5),
    ],
)
def test_a_failed_conversion_is_a_failed_check(
    machine: Diagnosis, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    def fail(*_: object, **__: object) -> ExportResult:
        raise error

    monkeypatch.setattr(doctor, "export", fail)
    check = conversion(machine)
    assert check.failed and check.exit_code == code and check.fix
    assert str(error) in check.detail


def test_a_conversion_that_proves_nothing_fails(
    machine: Diagnosis, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unchecked(_base: object, output: Path, **_: object) -> ExportResult:
        return ExportResult(output, None, None, {}, 0)

    monkeypatch.setattr(doctor, "export", unchecked)
    check = conversion(machine)
    assert check.failed and check.exit_code == ParityError.exit_code


@pytest.mark.parametrize("missing", ["paddlepaddle", "paddlenlp", "paddle2onnx", "onnxruntime"])
def test_without_an_extra_the_conversion_is_not_tried(machine: Diagnosis, missing: str) -> None:
    check = conversion(replace(machine, packages={**machine.packages, missing: None}))
    assert check.verdict is Verdict.INFO and "not tried" in check.detail


def test_a_graph_runs_on_the_cpu() -> None:
    (check,) = doctor.run_checks({"onnxruntime": "1.32.0"})
    assert (check.title, check.verdict) == ("run on cpu", Verdict.PASSED)
    assert doctor.run_checks({}) == []


def test_a_provider_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def __init__(self, _path: Path, *, provider: str) -> None:
            if provider == "cuda":
                raise ExecutionError("CUDA did not start", hint="look at the driver")
            self.runner = OnnxRunner(_path, provider=provider)
            self.run = self.runner.run

    monkeypatch.setattr(doctor, "OnnxRunner", Refusing)
    cpu, cuda = doctor.run_checks({"onnxruntime-gpu": "1.32.0"})
    assert cpu.verdict is Verdict.PASSED
    assert (cuda.failed, cuda.exit_code, cuda.fix) == (True, 2, "look at the driver")


@pytest.mark.parametrize("wrong", [lambda a, b: a @ b + 1e-3, lambda a, b: (a @ b).T])
def test_a_provider_that_computes_wrongly(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., np.ndarray]
) -> None:
    class Wrong:
        def __init__(self, _path: Path, *, provider: str) -> None:
            self.provider = provider

        def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {"product": wrong(feeds["a"], feeds["b"])}

    monkeypatch.setattr(doctor, "OnnxRunner", Wrong)
    (check,) = doctor.run_checks({"onnxruntime": "1.32.0"})
    assert check.failed and "instead of" in check.detail
