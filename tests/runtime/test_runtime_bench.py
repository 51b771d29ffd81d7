"""Measuring bundles: what is measured, what is said of it, and what is refused. Never how fast it was."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from peft_deploy.cli import cli
from peft_deploy.config.bench import BenchOptions
from peft_deploy.errors import ConfigError
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
