"""Measuring bundles: what is measured, what is said of it, and what is refused. Never how fast it was."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_graph
import tiny_slots
from click.testing import CliRunner

from peft_deploy.cli import cli
from peft_deploy.config.bench import BenchOptions
from peft_deploy.errors import ConfigError
from peft_deploy.runtime import caching, initial_cache
from peft_deploy.workflows.bench import bench

SMALL = {"prompt_tokens": (3, 5), "new_tokens": 2, "rounds": 2, "threads": 1}


@pytest.fixture
def twin(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "twin"))


def test_every_bundle_at_every_size(bundle: Path, twin: Path) -> None:
    report = bench([bundle, twin], options=BenchOptions(batches=(1, 3), **SMALL))  # type: ignore[arg-type]
    found = [(s.lane, s.batch, s.prompt_tokens) for s in report.speeds]
    sizes = [(b, n) for b in (1, 3) for n in (3, 5)]
    assert found == [(lane, b, n) for b, n in sizes for lane in ("bundle", "twin")]
    for speed in report.speeds:
        assert speed.prefill_seconds > 0 and speed.decode_seconds > 0
        tokens = speed.batch * speed.prompt_tokens
        assert math.isclose(speed.prefill_tokens_per_second * speed.prefill_seconds, tokens)
        assert math.isclose(speed.decode_tokens_per_second * speed.decode_seconds, speed.batch)
        assert speed.peak_memory is not None and speed.peak_memory > 20e6  # of a Python process
        if speed.lane == "bundle":
            assert speed.prefill_ratio == speed.decode_ratio == 1
    assert [lane.disk for lane in report.lanes] == [
        sum(p.stat().st_size for p in folder.iterdir()) for folder in (bundle, twin)
    ]


def test_the_command_prints_a_table_or_json(bundle: Path) -> None:
    arguments = [
        "bench",
        str(bundle),
        "--rounds",
        "1",
        "--new-tokens",
        "1",
        "--prompt-tokens",
        "4",
    ]
    table = CliRunner().invoke(cli, arguments)
    assert table.exit_code == 0, table.output
    assert "first token" in table.output and "on disk" in table.output
    result = CliRunner().invoke(cli, [*arguments, "--json"])
    data = json.loads(result.stdout)
    assert [speed["lane"] for speed in data["speeds"]] == ["bundle"]
    assert data["options"]["prompt_tokens"] == [4]


@pytest.mark.parametrize("bank", [None, 3])
def test_slots_off_each_adapter_and_merged(
    bank: int | None, bundle: Path, weights: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """Every adapter is really on where it is measured."""
    slotted = tiny_slots.add_slots(bundle, tmp_path / "slotted", bank=bank)
    adapters = {
        name: tiny_slots.make_adapter(weights, tiny_slots.everywhere(rank), seed=rank)
        for name, rank in (("small", 2), ("large", 16))
    }
    for name, tensors in adapters.items():
        tiny_slots.keep_adapter(slotted, name, tensors)
    options = BenchOptions(prompt_tokens=(3,), new_tokens=1, rounds=1, threads=1)
    report = bench([slotted, bundle], options=options)
    names = ["slotted", "slotted + small", "slotted + large", "bundle"]
    assert [lane.name for lane in report.lanes] == names
    assert [speed.lane for speed in report.speeds] == names
    for lane, change in zip(report.lanes, ([], ["small"], ["large"], []), strict=True):
        changed = tiny_slots.merged(weights, [adapters[name] for name in change])
        want = tiny_graph.reference_logits(changed, [5, 9, 77])
        runner = caching(lane.runner)
        cache = runner.load_cache(initial_cache(runner.signature, 1))
        feeds = {
            "input_ids": np.array([[5, 9, 77]]),
            "attention_mask": np.ones((1, 3), np.int64),
            "position_ids": np.arange(3)[None],
        }
        found, _ = runner.step(feeds, cache)
        np.testing.assert_allclose(found[0], want, atol=1e-5 * np.abs(want).max())
    chosen = BenchOptions(**{**SMALL, "adapters": ("large",)})  # type: ignore[arg-type]
    lanes = bench([slotted, bundle], options=chosen).lanes
    assert [lane.name for lane in lanes] == ["slotted", "slotted + large", "bundle"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rounds": 0}, "rounds is 0"),
        ({"batches": (1, 0)}, r"batches is \(1, 0\)"),
        ({"adapters": ("poet",)}, "no bundle has the adapter poet"),
        ({"prompt_tokens": (4000,)}, "4000 tokens and 2 new ones make 4002"),
    ],
)
def test_what_cannot_be_measured(bundle: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        bench([bundle], options=BenchOptions(**{**SMALL, **changes}))  # type: ignore[arg-type]


def test_bundles_of_one_name_are_told_apart(bundle: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(bundle, tmp_path / bundle.name))
    options = BenchOptions(prompt_tokens=(2,), new_tokens=1, rounds=1)
    report = bench([bundle, other], options=options)
    assert [lane.name for lane in report.lanes] == [str(bundle), str(other)]
