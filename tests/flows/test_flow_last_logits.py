"""Bundles with the logits of the last token alone, from export to generation."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from flows_genai import Genai, needs_genai, ours
from model_recipes import load_recipe

import peft_deploy
from peft_deploy.bundle import MODEL, Manifest
from peft_deploy.cli import cli
from peft_deploy.config.export import ExportOptions
from peft_deploy.errors import ConfigError
from peft_deploy.runtime import GenerationOptions, Session, open_runner
from peft_deploy.workflows.validate import validate

tiny = load_recipe("tiny")
PROMPTS = [[3, 17, 5, 9, 40, 33], [8, 5, 6], [40, 99, 33, 7, 1, 9, 12, 4]]

pytestmark = pytest.mark.convert


@pytest.fixture(scope="module")
def bundle(tiny_llama: Path, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("last") / "last"
    options = ["--base", tiny_llama, "--adapter", tiny_adapter, "--merge", "--last-logits"]
    options += ["--output", output]
    result = CliRunner().invoke(cli, ["export", *map(str, options)])
    assert result.exit_code == 0, result.output
    assert "Parity passed" in result.output
    return output


def test_it_generates_what_all_logits_generate(bundle: Path, merged_bundle: Path) -> None:
    last, whole = Session(bundle), Session(merged_bundle)
    assert last.signature == whole.signature.with_last_logits() != whole.signature
    assert last.signature.last_logits and not whole.signature.last_logits
    options = GenerationOptions(max_new_tokens=12)
    for prompts in (PROMPTS[:1], PROMPTS):
        found, wanted = (
            [r.token_ids for r in one.generate(prompts, options)] for one in (last, whole)
        )
        assert found == wanted
    right = GenerationOptions(max_new_tokens=2, padding="right")
    assert last.generate(PROMPTS[:1], right)[0].token_ids == found[0][:2]
    alike = [PROMPTS[0], PROMPTS[0][::-1]]  # nothing is padded
    rows = [[r.token_ids for r in one.generate(alike, right)] for one in (last, whole)]
    assert rows[0] == rows[1]
    with pytest.raises(ConfigError, match="padded on the right"):
        last.generate(PROMPTS, right)


@needs_genai
def test_onnxruntime_genai_takes_it(bundle: Path, merged_bundle: Path) -> None:
    genai, whole = Genai(bundle), Session(merged_bundle)
    for prompts in (PROMPTS[:1], [PROMPTS[0], PROMPTS[0][::-1]]):
        assert genai.tokens(prompts, 10) == ours(whole, prompts, 10, genai.ends)


def test_it_is_checked_again_and_faults_are_found(
    bundle: Path, tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    assert validate(bundle, base=tiny_llama, adapter=tiny_adapter).passed
    with pytest.raises(ConfigError, match="cannot be bisected"):
        validate(bundle, base=tiny_llama, adapter=tiny_adapter, bisect=tmp_path / "found")
    spoilt = tmp_path / "spoilt"
    shutil.copytree(bundle, spoilt)
    model = ir.load(spoilt / MODEL)
    model.graph.initializers["last_token"].const_value = ir.tensor(np.array([0], np.int64))
    ir.save(model, spoilt / MODEL)
    report = validate(spoilt, base=tiny_llama, adapter=tiny_adapter)
    failed = {case.name for case in report.cases if not case.passed}
    assert "random tokens" in failed and "one token" not in failed


def test_slots_a_recorded_reference_and_int4(
    tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    options = ExportOptions(
        adapters="runtime", last_logits=True, record_reference=True, precision="int4"
    )
    result = peft_deploy.export(
        tiny_llama, tmp_path / "out", adapter=f"tuned={tiny_adapter}", options=options
    )
    assert result.parity is not None and result.parity.loss is not None
    assert result.parity.loss.kl is not None and 0 < result.parity.loss.kl < 2
    assert validate(tmp_path / "out").passed


def test_t5(tmp_path: Path) -> None:
    tiny.make(tmp_path / "base", "t5")
    options = ExportOptions(merge=False, last_logits=True)
    peft_deploy.export(tmp_path / "base", tmp_path / "out", options=options)
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.signature.last_logits and manifest.encoder is not None
    assert open_runner(tmp_path / "out").signature.last_logits


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    tiny.make(tmp_path / "base", "bert-classification")
    with pytest.raises(ConfigError, match="writes no text"):
        peft_deploy.export(
            tmp_path / "base", tmp_path / "out", options=ExportOptions(last_logits=True)
        )
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="Paddle's own"):
        ExportOptions(last_logits=True, format="paddle")
    with pytest.raises(ConfigError, match="16 bits"):
        ExportOptions(last_logits=True, precision="fp16")


def test_in_16_bits_it_is_not_checked(tiny_llama: Path, tmp_path: Path) -> None:
    """Of good bundles of gemma a fifth would fail."""
    options = ExportOptions(last_logits=True, precision="fp16", validate=False)
    peft_deploy.export(tiny_llama, tmp_path / "out", options=options)
    with pytest.raises(ConfigError, match="16 bits") as caught:
        validate(tmp_path / "out", base=tiny_llama)
    assert "without --last-logits" in (caught.value.hint or "")
