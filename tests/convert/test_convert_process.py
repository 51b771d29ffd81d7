"""The converter's process: what comes back, and what happens when it dies."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from peft_deploy.convert import ConversionJob, process
from peft_deploy.convert.process import started_early
from peft_deploy.errors import ConverterCrashError, MissingExtraError, UnsupportedModelError

pytestmark = [pytest.mark.convert, pytest.mark.usefixtures("no_graph_cache")]


@pytest.fixture
def config(tiny_llama: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((tiny_llama / "config.json").read_text("utf-8"))
    return loaded


def test_graph_comes_back_without_weights_and_with_their_names(config: dict[str, Any]) -> None:
    phases: list[str] = []
    with ConversionJob(config, 17) as job:
        converted = job.result(phases.append)
        folder = job._folder
    assert not folder.exists()
    assert phases[0] == "Importing Paddle" and "Tracing" in phases
    assert len(converted.model.graph.initializers) == 0
    names = set(converted.parameters.values())
    assert names == set(converted.shapes)
    assert "llama.layers.1.mlp.down_proj.weight" in names
    assert {c.shape for c in converted.constants.values()} == {(256, 4)}
    assert converted.operations["pd_op.softmax"][1]["module"] == "llama.layers.1.self_attn"


def test_nothing_is_left_in_the_users_home(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with ConversionJob(config, 17) as job:
        job.result(lambda _title: None)
    assert list(tmp_path.rglob("*")) == []


def test_the_graph_is_read_when_nothing_is_imported_any_more(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What two threads import at once, they may see half-made."""
    ended, imported = threading.Event(), list[bool]()

    def slow() -> None:
        ended.wait(600)
        time.sleep(0.5)
        imported.append(True)

    def read(_job: ConversionJob) -> list[bool]:
        return list(imported)

    def phase(title: str) -> None:
        if title == "Converting to ONNX":
            ended.set()

    monkeypatch.setattr(process, "_import_libraries", slow)
    monkeypatch.setattr(ConversionJob, "_read", read)
    monkeypatch.setattr(process._Child, "_start", ended_child)
    with ConversionJob(config, 17) as job:
        assert job.result(phase) == [True]


def ended_child(_child: process._Child, events: int) -> subprocess.Popen[bytes]:
    """Says that it converts, and ends."""
    script = f"import os; os.write({events}, b'Converting to ONNX\\n')"
    return subprocess.Popen([sys.executable, "-S", "-c", script], pass_fds=(events,))


def test_a_child_that_dies_is_an_error_with_its_log(config: dict[str, Any]) -> None:
    with ConversionJob(config, 17) as job:
        assert job._child is not None
        job._child.process.send_signal(signal.SIGABRT)
        with pytest.raises(ConverterCrashError, match="was ended by SIGABRT"):
            job.result(lambda _title: None)


def test_an_error_of_the_child_arrives_as_what_it_is(config: dict[str, Any]) -> None:
    with (
        ConversionJob({**config, "hidden_act": "relu"}, 17) as job,
        pytest.raises(UnsupportedModelError, match="relu"),
    ):
        job.result(lambda _title: None)


def test_leaving_early_ends_the_child(config: dict[str, Any]) -> None:
    with ConversionJob(config, 17) as job:
        child = job._child
    assert child is not None and child.process.returncode == -signal.SIGKILL


def test_a_process_that_was_started_early_does_the_next_job(config: dict[str, Any]) -> None:
    with started_early():
        (early,) = process._early
        with ConversionJob(config, 17) as job:
            assert job._child is early and not process._early
            converted = job.result(lambda _title: None)
            folder = job._folder
        with ConversionJob(config, 17) as second:
            assert second._child is not early
    assert not folder.exists()
    assert "llama.layers.1.mlp.down_proj.weight" in converted.parameters.values()


def test_an_early_process_that_nobody_takes_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ValueError, match="before any job"), started_early():
        (early,) = process._early
        raise ValueError("before any job")
    assert early.process.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == [] and not process._early


def test_an_early_process_whose_parent_is_gone_ends_by_itself() -> None:
    with started_early():
        (early,) = process._early
        assert early.process.stdin is not None
        early.process.stdin.close()
        assert early.process.wait(120) == 0


def test_an_early_process_that_died_is_an_error_with_its_log(config: dict[str, Any]) -> None:
    with started_early():
        (early,) = process._early
        early.process.send_signal(signal.SIGABRT)
        early.process.wait()
        with (
            ConversionJob(config, 17) as job,
            pytest.raises(ConverterCrashError, match="was ended by SIGABRT"),
        ):
            job.result(lambda _title: None)


def test_without_paddle_nothing_is_started_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph may be kept from before, and needs none."""

    def missing(*_names: str) -> None:
        raise MissingExtraError("paddle is not installed")

    monkeypatch.setattr(process, "require", missing)
    with started_early():
        assert not process._early
