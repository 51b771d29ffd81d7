"""What rounding loses of a merged adapter: in the manifest, in inspect, and in a warning."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from flows_adapter import adapter_for

import peft_deploy
from peft_deploy.bundle import Manifest
from peft_deploy.cli.inspect import inspect_command
from peft_deploy.config.export import ExportOptions

pytestmark = pytest.mark.convert


def inspected(bundle: Path) -> str:
    result = CliRunner().invoke(inspect_command, [str(bundle)])
    assert result.exit_code == 0
    return " ".join(result.stderr.split())


def test_a_trained_adapter_loses_next_to_nothing(merged_bundle: Path) -> None:
    (entry,) = Manifest.read(merged_bundle).adapters
    assert entry["rounding"]["dtype"] == "float32"
    lost = entry["rounding"]["lost"]
    assert sorted(lost) == entry["targets"]
    assert all(0 < share < 1e-5 for share in lost.values())
    worst = max(lost, key=lost.__getitem__)
    text = inspected(merged_bundle)
    assert f"at most {lost[worst]:.2g} of a layer's change ({worst})" in text
    assert "was lost in" not in text


def test_an_adapter_below_the_rounding_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = adapter_for(tiny_llama, tmp_path / "faint", spread=(0.3, 1e-9))
    with pytest.warns(UserWarning, match=r"rounding to float32 lost more than 0\.25") as caught:
        peft_deploy.export(
            tiny_llama, tmp_path / "out", adapter=adapter, options=ExportOptions(validate=False)
        )
    assert any("layers.1.mlp.down_proj.weight: " in str(w.message) for w in caught)
    assert "more than 0.25 was lost in: llama.layers." in inspected(tmp_path / "out")
