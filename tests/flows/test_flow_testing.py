"""A bundle's check as tests: the function, the pytest plugin, and the workflow that users copy."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import peft_deploy
from peft_deploy.testing import assert_parity

pytestmark = pytest.mark.convert

ROOT = Path(peft_deploy.__file__).parents[1]
WORKFLOW = ROOT / "docs" / "parity-workflow.yml"


@pytest.fixture
def broken(recorded: Path, base_bundle: Path, tmp_path: Path) -> Path:
    """A recorded bundle with other weights."""
    folder = Path(shutil.copytree(recorded, tmp_path / "broken"))
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copyfile(base_bundle / name, folder / name)
    return folder


def run_pytest(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """In a process and a folder of its own, with this plugin and no other."""
    command = [sys.executable, "-m", "pytest", "-p", "peft_deploy.testing.plugin", "-v"]
    return subprocess.run(
        [*command, "--color=no", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )


def test_a_good_bundle_passes(recorded: Path, tmp_path: Path) -> None:
    found = assert_parity(recorded, report=tmp_path / "r")
    assert found.passed and (tmp_path / "r" / "junit.xml").is_file()


def test_a_good_bundle_passes_with_its_base(
    merged_bundle: Path, tiny_llama: Path, tiny_adapter: Path
) -> None:
    assert assert_parity(merged_bundle, tiny_llama, tiny_adapter).effect is not None


def test_a_broken_bundle_fails_with_the_places(broken: Path) -> None:
    with pytest.raises(AssertionError) as caught:
        assert_parity(broken)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("Parity failed: ")
    assert re.search(r"present\.\d\.\w+\[.*\] is .*, the Paddle model says", lines[1])
    assert any("more cases" in line for line in lines)


def test_every_case_and_prompt_is_a_test(recorded: Path, tmp_path: Path) -> None:
    done = run_pytest(tmp_path, "--peft-deploy-bundle", recorded, "--junitxml", "tests.xml")
    assert done.returncode == 0, done.stdout
    report = peft_deploy.validate(recorded)
    assert report.generation is not None
    count = len(report.cases) + len(report.generation.prompts)
    assert f"{count} passed" in done.stdout
    names = [t.get("name") for t in ElementTree.parse(tmp_path / "tests.xml").iter("testcase")]
    assert len(set(names)) == count
    assert {"left padding", "greedy text: 'and'", "prompt 2: and"} <= set(names)


def test_collecting_runs_nothing(recorded: Path, tmp_path: Path) -> None:
    report = tmp_path / "report"
    done = run_pytest(
        tmp_path, "--co", "--peft-deploy-bundle", recorded, "--peft-deploy-report", report
    )
    assert "left padding" in done.stdout and not report.exists()


def test_broken_bundles_fail_one_by_one(recorded: Path, broken: Path, tmp_path: Path) -> None:
    bundles = ("--peft-deploy-bundle", recorded, "--peft-deploy-bundle", broken)
    done = run_pytest(tmp_path, *bundles, "--peft-deploy-report", "reports", "-k", "padding")
    assert done.returncode == 1
    assert "the Paddle model says" in done.stdout and "Traceback" not in done.stdout
    passed, failed = (int(re.search(rf"(\d+) {w}", done.stdout)[1]) for w in ("passed", "failed"))  # type: ignore[index]
    assert passed == failed >= 5
    for bundle in ("out", "broken"):
        assert (tmp_path / "reports" / bundle / "report.html").is_file()


def test_tests_of_ones_own_run_beside_them(recorded: Path, tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(
        "from peft_deploy.testing import assert_parity\n\n"
        f"def test_bundle():\n    assert_parity({str(recorded)!r})\n"
    )
    done = run_pytest(tmp_path, "--peft-deploy-bundle", recorded, "-k", "test_bundle or chunks")
    assert "3 passed" in done.stdout, done.stdout


def test_what_is_no_bundle_ends_the_run(merged_bundle: Path, tmp_path: Path) -> None:
    done = run_pytest(tmp_path, "--peft-deploy-bundle", tmp_path)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "is not a bundle" in done.stderr and "Traceback" not in done.stderr
    done = run_pytest(tmp_path, "--peft-deploy-bundle", merged_bundle)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "holds no recorded reference" in done.stderr and "--record-reference" in done.stderr


def test_a_base_gives_the_same_tests(
    merged_bundle: Path, tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    options = ("--peft-deploy-base", tiny_llama, "--peft-deploy-adapter", tiny_adapter)
    done = run_pytest(tmp_path, "--peft-deploy-bundle", merged_bundle, *options)
    assert done.returncode == 0 and "left padding PASSED" in done.stdout


def steps() -> list[dict[str, Any]]:
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load(WORKFLOW.read_text("utf-8"))
    assert set(workflow) == {"name", True, "jobs"}  # YAML reads the key "on" as a boolean
    (job,) = workflow["jobs"].values()
    assert list(job["env"]) == ["BUNDLE"]
    found: list[dict[str, Any]] = job["steps"]
    assert all(("uses" in step) != ("run" in step) for step in found)
    return found


def test_the_workflow_runs(recorded: Path, broken: Path, tmp_path: Path) -> None:
    """Its commands, one by one, but for the installation."""
    bin_folder = Path(sys.executable).parent
    for bundle in (recorded, broken):
        environment = {
            **os.environ,
            "BUNDLE": str(bundle),
            "GITHUB_STEP_SUMMARY": str(tmp_path / f"{bundle.name}.md"),
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTEST_PLUGINS": "peft_deploy.testing.plugin",
        }
        codes = {}
        for step in steps():
            if "run" in step and step["name"] != "Install":
                done = subprocess.run(step["run"], shell=True, cwd=tmp_path, env=environment)
                codes[step["name"]] = done.returncode
        good = bundle == recorded
        expected = [0, 0, 0] if good else [6, 1, 0]
        assert list(codes.values()) == expected
        summary = (tmp_path / f"{bundle.name}.md").read_text("utf-8")
        assert (": passed" in summary) is good and (": FAILED" in summary) is not good


def test_the_workflow_installs_what_there_is() -> None:
    tomllib = pytest.importorskip("tomllib")  # not in Python 3.10

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (install,) = (step["run"] for step in steps() if step.get("name") == "Install")
    assert f'"{project["name"]}[cpu]"' in install and "cpu" in project["optional-dependencies"]
    (plugin,) = project["entry-points"]["pytest11"].values()
    assert plugin == "peft_deploy.testing.plugin"
