"""The converter's process: what comes back, and what happens when it dies."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from peft_deploy.convert import ConversionJob
from peft_deploy.errors import ConverterCrashError, UnsupportedModelError

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


def test_a_child_that_dies_is_an_error_with_its_log(config: dict[str, Any]) -> None:
    with ConversionJob(config, 17) as job:
        assert job._process is not None
        job._process.send_signal(signal.SIGABRT)
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
        process = job._process
    assert process is not None and process.returncode == -signal.SIGKILL
