"""What is said of machines with one thing or another installed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from peft_deploy.diagnosis import (
    CONFLICTS,
    Check,
    Conflict,
    Diagnosis,
    Machine,
    Verdict,
    check_machine,
    fits,
)
from peft_deploy.diagnosis.extras import own_requirements
from peft_deploy.diagnosis.versions import canonical_name

MACHINE = Machine("3.11.7", "CPython", "Linux x86_64", "Some CPU", False, 2, 8_000_000_000, None)
BASE = {
    "peft-deploy": "0.1.0",
    "numpy": "1.26.4",
    "tokenizers": "0.21.4",
    "safetensors": "0.8.0",
    "threadpoolctl": "3.8.0",
    "click": "8.5.1",
    "rich": "15.0.0",
    "jinja2": "3.1.6",
    "onnx-ir": "1.1.0",
}
CPU = {**BASE, "onnxruntime": "1.32.0"}
PADDLE = {
    **CPU,
    "paddlepaddle": "3.3.1",
    "paddlenlp": "3.0.0b4",
    "paddle2onnx": "2.1.0",
    "onnx": "1.17.0",
    "onnxscript": "0.7.2",
    "aistudio-sdk": "0.2.6",
    "datasets": "3.6.0",
    "pyarrow": "20.0.0",
    "pandas": "2.3.3",
    "scipy": "1.15.3",
    "setuptools": "80.10.2",
}


def failed(found: Diagnosis) -> list[Check]:
    return [check for check in found.checks if check.failed]


def titled(found: Diagnosis, title: str) -> Check:
    (check,) = [check for check in found.checks if check.title == title]
    return check


def test_the_sets_here_cover_what_we_require() -> None:
    for requirement in own_requirements():
        if requirement.extra in (None, "cpu", "paddle"):
            assert fits(PADDLE[requirement.name], requirement.bounds), requirement


def test_everything_in_place() -> None:
    found = check_machine(PADDLE, MACHINE)
    assert found.passed and found.exit_code == 0
    assert found.extras == {"base": True, "cpu": True, "gpu": False, "paddle": True}
    assert all(check.fix is None for check in found.checks)


def test_enough_to_run_bundles() -> None:
    found = check_machine(CPU, MACHINE)
    assert found.exit_code == 0
    check = titled(found, "training and export")
    assert check.verdict is Verdict.INFO
    assert check.fix == "pip install 'peft-deploy[paddle]'"


def test_only_the_base_install() -> None:
    found = check_machine(BASE, MACHINE)
    (check,) = failed(found)
    assert check.title == "running bundles"
    assert "pip install 'peft-deploy[cpu]'" in str(check.fix)
    assert found.exit_code == 2 and found.base_works


def test_a_base_package_is_missing() -> None:
    found = check_machine({k: v for k, v in CPU.items() if k != "tokenizers"}, MACHINE)
    (check,) = failed(found)
    assert "missing tokenizers" in check.detail
    assert check.fix == "pip install 'tokenizers>=0.20'"
    assert not found.base_works and found.exit_code == 2


def test_half_an_extra() -> None:
    found = check_machine({**CPU, "paddlepaddle": "3.3.1", "onnx": "1.17.0"}, MACHINE)
    check = titled(found, "training and export")
    assert check.failed
    assert "missing paddlenlp, paddle2onnx, onnxscript, " in check.detail
    assert "'paddlenlp==3.0.0b4'" in str(check.fix)
    assert "'paddlepaddle" not in str(check.fix)


def test_a_version_out_of_bounds() -> None:
    found = check_machine({**PADDLE, "onnxscript": "1.0.0"}, MACHINE)
    (check,) = failed(found)
    assert "onnxscript 1.0.0 is not <1,>=0.7" in check.detail


def test_paddles_gpu_build_stands_for_paddle() -> None:
    packages = {k: v for k, v in PADDLE.items() if k != "paddlepaddle"}
    assert check_machine({**packages, "paddlepaddle-gpu": "3.3.1"}, MACHINE).passed
    assert not check_machine({**packages, "paddlepaddle-gpu": "2.6.2"}, MACHINE).passed


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"paddlepaddle": "3.3.0"}, "ir::FloatAttribute"),
        ({"onnx": "1.18.0"}, "IR version"),
        ({"numpy": "2.3.0"}, "numpy 2"),
        ({"onnxruntime-gpu": "1.32.0"}, "overwrite"),
        ({"paddlepaddle-gpu": "3.3.1"}, "overwrite"),
        ({"aistudio-sdk": "0.3.1"}, "aistudio-sdk"),
        ({"datasets": "4.0.0"}, "datasets"),
        ({"pyarrow": "21.0.0"}, "pyarrow"),
        ({"pandas": "3.0.0"}, "pandas"),
        ({"scipy": "1.16.0"}, "scipy"),
        ({"setuptools": "81.0.0"}, "setuptools"),
        ({"paddlepaddle-gpu": "2.6.2", "paddlepaddle": ""}, "PyPI"),
        ({"paddle2onnx": "1.3.1"}, "cannot read the programs"),
        ({"paddlepaddle": "2.6.2"}, "beside Paddle 2"),
    ],
)
def test_known_bad_combinations(changes: dict[str, str], word: str) -> None:
    packages = {name: version for name, version in {**PADDLE, **changes}.items() if version}
    found = check_machine(packages, MACHINE)
    named = [c for c in failed(found) if c.title == "known bad combinations" and word in c.detail]
    assert len(named) == 1 and named[0].fix
    assert found.exit_code == 2


@pytest.mark.parametrize("conflict", CONFLICTS, ids=lambda c: " + ".join(c.when))
def test_each_conflict_is_well_formed(conflict: Conflict) -> None:
    assert conflict.problem and conflict.fix
    for name, bounds in conflict.when.items():
        assert name == canonical_name(name)
        fits("1.0", bounds)


def test_a_python_that_paddle2onnx_does_not_know() -> None:
    found = check_machine(PADDLE, replace(MACHINE, python="3.13.1"))
    assert {check.title for check in failed(found)} == {"Python", "known bad combinations"}


@pytest.mark.parametrize(
    ("switch", "word"), [(None, "is given"), ("5", "is given"), ("4", "slow")]
)
def test_amd(switch: str | None, word: str) -> None:
    found = check_machine(CPU, replace(MACHINE, amd=True, mkl_switch=switch))
    check = titled(found, "processor")
    assert word in check.detail and "MKL_DEBUG_CPU_TYPE" in check.detail
    assert (check.fix is None) == (word == "is given")
    assert "MKL" not in titled(check_machine(CPU, MACHINE), "processor").detail


def test_this_machine_runs_these_tests() -> None:
    found = check_machine()
    assert found.base_works
    assert found.packages["peft-deploy"] and found.packages["numpy"]
    assert titled(found, "execution providers").verdict is Verdict.PASSED
    json.dumps(found.to_dict())


def test_the_conversions_code_counts_for_more() -> None:
    checks = (Check("a", Verdict.FAILED, ""), Check("b", Verdict.FAILED, "", exit_code=5))
    found = Diagnosis(MACHINE, {}, {}, checks)
    assert found.exit_code == 5
    assert replace(found, checks=checks[:1]).exit_code == 2
    assert replace(found, checks=()).exit_code == 0
