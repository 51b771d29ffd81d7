"""Bundles in int4 whose scales a text chose, from export to a check of what is in the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import peft_deploy
from peft_deploy.bundle import MODEL_DATA, Manifest
from peft_deploy.config.export import ExportOptions
from peft_deploy.environment import require_paddle
from peft_deploy.errors import BundleError, ConfigError
from peft_deploy.parity.passages import CALIBRATION
from peft_deploy.text import Tokenizer

require_paddle("the reference")  # now: what it warns of when it is imported is no test's business

pytestmark = pytest.mark.convert

FILE = "calibration.safetensors"
LAYER = "llama.layers.0"


def export(base: Path, output: Path, **given: Any) -> Path:
    options = {"precision": "int4", "calibration": "builtin", **given.pop("options", {})}
    peft_deploy.export(base, output, options=ExportOptions(**options), **given)
    return output


@pytest.fixture(scope="module")
def merged(tiny_llama: Path, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("calibrated") / "merged"
    return export(tiny_llama, output, adapter=tiny_adapter)


def test_the_bundle_passes_and_says_what_its_scales_were_chosen_by(
    merged: Path, tiny_llama: Path
) -> None:
    manifest = Manifest.read(merged)
    assert manifest.parity is not None and manifest.parity["passed"]
    quantized = manifest.graph["quantized"]
    assert set(quantized["calibrated"]) == set(quantized["weights"]["int4"])
    tokens = len(Tokenizer.from_folder(tiny_llama).encode(CALIBRATION))
    facts = quantized["calibration"]
    assert facts["text"] == "builtin" and facts["tokens"] == tokens > 300
    assert FILE in manifest.files


def test_importance_is_what_the_first_layer_is_given(merged: Path, tiny_llama: Path) -> None:
    """Computed here from the checkpoint: the norm of the embeddings, which no adapter changes."""
    tensors = load_file(tiny_llama / "model.safetensors")
    config = json.loads((tiny_llama / "config.json").read_text())
    ids = Tokenizer.from_folder(tiny_llama).encode(CALIBRATION)
    embeddings = tensors["model.embed_tokens.weight"][ids].astype(np.float64)
    norm = np.sqrt((embeddings**2).mean(-1, keepdims=True) + config["rms_norm_eps"])
    given = embeddings / norm * tensors["model.layers.0.input_layernorm.weight"]
    squares = load_file(merged / FILE)
    for projection in "qkv":
        found = squares[f"{LAYER}.self_attn.{projection}_proj.weight"]
        np.testing.assert_allclose(found, (given**2).mean(0), rtol=1e-4)
    sizes = {name.split(".", 3)[3]: array.shape for name, array in squares.items()}
    assert sizes["mlp.down_proj.weight"] == (config["intermediate_size"],)
    assert len(squares) == 7 * config["num_hidden_layers"]


def test_the_file_is_compared_with_the_scales_that_were_chosen(
    merged: Path, tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    report = peft_deploy.validate(merged, tiny_llama, adapter=tiny_adapter)
    assert report.passed, report.summary()
    nearest = export(
        tiny_llama,
        tmp_path / "nearest",
        adapter=tiny_adapter,
        options={"calibration": None, "validate": False},
    )
    assert Manifest.read(nearest).graph["quantized"]["calibrated"] == []
    broken = tmp_path / "broken"
    shutil.copytree(merged, broken)
    shutil.copyfile(nearest / MODEL_DATA, broken / MODEL_DATA)
    report = peft_deploy.validate(broken, tiny_llama, adapter=tiny_adapter)
    failed = [case.name for case in report.cases if not case.passed]
    assert "weights, byte by byte" in failed and len(failed) > 5


def test_another_calibration_file_is_refused(
    merged: Path, tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(merged, broken)
    data = bytearray((broken / FILE).read_bytes())
    data[-1] ^= 1
    (broken / FILE).write_bytes(data)
    with pytest.raises(BundleError, match="not the file that the export wrote"):
        peft_deploy.validate(broken, tiny_llama, adapter=tiny_adapter)


def test_slots_and_a_text_of_ones_own(tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text("the lamp had burned all night and the shore was far " * 30)
    bundle = export(
        tiny_llama,
        tmp_path / "out",
        options={"calibration": text, "adapters": "runtime"},
    )
    manifest = Manifest.read(bundle)
    assert manifest.parity is not None and manifest.parity["passed"]
    assert manifest.graph["quantized"]["calibration"]["text"] == "own.txt"
    assert peft_deploy.validate(bundle, tiny_llama).passed


def test_what_cannot_be_read_is_said_before_anything_is_written(
    tiny_llama: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("the lamp")
    for calibration, message in ((short, "at least 64"), (tmp_path / "none", "cannot be read")):
        for dry_run in (False, True):
            options = {"calibration": calibration, "dry_run": dry_run}
            with pytest.raises(ConfigError, match=message):
                export(tiny_llama, tmp_path / "out", options=options)
        assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="the precision is int8"):
        ExportOptions(precision="int8", calibration="builtin")
