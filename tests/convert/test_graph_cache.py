"""Graphs kept between exports: the same as anew, and never one that is broken or of something else."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from peft_deploy.convert import ConversionJob, ConvertedGraph, graph_cache, process
from peft_deploy.convert.graph_cache import CACHE_VARIABLE, GraphCache, cache_folder

REQUEST: dict[str, Any] = {"config": {"model_type": "llama"}, "opset": 17, "format": "onnx"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "graphs"


def keep(folder: Path, request: dict[str, Any] = REQUEST, text: str = "graph") -> None:
    (folder / "encoder").mkdir(parents=True, exist_ok=True)
    for name in ("graph.onnx", "encoder/graph.onnx", "log.txt"):
        (folder / name).write_text(text)
    GraphCache(request).keep(folder, frozenset({"graph.onnx"}))


def taken(folder: Path, request: dict[str, Any] = REQUEST) -> bool:
    folder.mkdir(parents=True)
    found = GraphCache(request).take(folder)
    assert found or not list(folder.iterdir())
    return found


def test_what_was_kept_is_taken_by_the_same_request_only(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not taken(tmp_path / "before")
    keep(tmp_path / "made")
    assert taken(tmp_path / "after")
    files = {
        p.relative_to(tmp_path / "after").as_posix() for p in tmp_path.glob("after/**/*.onnx")
    }
    assert files == {"graph.onnx", "encoder/graph.onnx"}
    for i, change in enumerate(({"opset": 23}, {"format": "paddle"}, {"config": {}})):
        assert not taken(tmp_path / f"other{i}", {**REQUEST, **change})
    with monkeypatch.context() as patched:
        patched.setattr(graph_cache, "_version", lambda _package: "0")
        assert not taken(tmp_path / "other-software")
    changed = tmp_path / "source.py"
    changed.write_text("x = 1")
    monkeypatch.setattr(graph_cache, "_own_sources", lambda: [changed])
    keep(tmp_path / "made")
    assert taken(tmp_path / "same-source")
    changed.write_text("x = 2")
    assert not taken(tmp_path / "other-source")


def test_a_broken_entry_is_not_taken_and_is_replaced(cache: Path, tmp_path: Path) -> None:
    keep(tmp_path / "made")
    (entry,) = cache.iterdir()
    for i, spoil in enumerate(
        (
            lambda: (entry / "encoder" / "graph.onnx").write_text("grapx"),
            lambda: (entry / "graph.onnx").unlink(),
            lambda: (entry / "graph.txt").write_text("one more"),
            lambda: (entry / "hashes.json").write_text("{"),
            lambda: (entry / "hashes.json").unlink(),
        )
    ):
        spoil()
        assert not taken(tmp_path / f"spoilt{i}")
        keep(tmp_path / "made")
        assert taken(tmp_path / f"whole{i}")
    assert [path.name for path in cache.iterdir()] == [entry.name]


def test_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x" / "peft-deploy" / "graphs"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "peft-deploy" / "graphs"
    monkeypatch.setenv(CACHE_VARIABLE, "")
    assert cache_folder() is None
    keep(tmp_path / "made")
    assert not taken(tmp_path / "after") and not (tmp_path / ".cache").exists()
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))  # nothing can be written there
    keep(tmp_path / "made")
    assert not taken(tmp_path / "again")


def test_a_user_without_a_home_keeps_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in (CACHE_VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert cache_folder() is None


def test_a_cache_that_can_only_be_read_is_read(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(tmp_path / "made")

    def refused(path: Path, *_: object, **__: object) -> None:
        if cache in Path(path).parents:
            raise PermissionError(path)

    monkeypatch.setattr(os, "utime", refused)
    assert taken(tmp_path / "after")


def test_the_oldest_are_forgotten(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_cache, "MOST_ENTRIES", 2)
    names = []
    for opset in (17, 18, 19):
        keep(tmp_path / "made", {**REQUEST, "opset": opset})
        for path in set(cache.iterdir()) - set(names):
            os.utime(path, (opset, opset))
            names.append(path)
        if opset == 18:  # whoever is used is not old
            assert taken(tmp_path / "used", {**REQUEST, "opset": 17})
    assert set(cache.iterdir()) == {names[0], names[2]}


@pytest.mark.convert
def test_the_graph_is_the_same_and_no_process_starts(
    cache: Path, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((tiny_llama / "config.json").read_text("utf-8"))
    with ConversionJob(config, 17) as job:
        made = job.result(lambda _title: None)

    def refused(*_: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(process._Child, "_start", refused)
    phases: list[str] = []
    with ConversionJob(config, 17) as job:
        again = job.result(phases.append)
        folder = job._folder
    assert phases == ["Taking the graph from the cache"] and not folder.exists()
    assert isinstance(made, ConvertedGraph) and isinstance(again, ConvertedGraph)
    assert (
        ir.to_proto(again.model).SerializeToString() == ir.to_proto(made.model).SerializeToString()
    )
    assert (again.parameters, again.shapes, again.operations, again.versions) == (
        made.parameters,
        made.shapes,
        made.operations,
        made.versions,
    )
    assert again.constants.keys() == made.constants.keys()
    for name, array in made.constants.items():
        np.testing.assert_array_equal(again.constants[name], array)
    with pytest.raises(AssertionError, match="a process was started"):
        ConversionJob({**config, "rope_theta": 12345.0}, 17)


@pytest.mark.convert
def test_a_process_that_was_started_early_is_ended_where_the_graph_is_there(
    cache: Path, tiny_llama: Path
) -> None:
    config = json.loads((tiny_llama / "config.json").read_text("utf-8"))
    with ConversionJob(config, 17) as job:
        job.result(lambda _title: None)
    with process.started_early():
        (early,) = process._early
        with ConversionJob(config, 17) as job:
            assert early.process.returncode == -signal.SIGKILL
            assert isinstance(job.result(lambda _title: None), ConvertedGraph)
        assert not early.folder.exists()
