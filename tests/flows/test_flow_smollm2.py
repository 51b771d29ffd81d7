"""The real model: from its folder and an adapter to a bundle, and the same tokens from both sides."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from flows_adapter import adapter_for
from flows_loops import node_names, paddle_loop, plain_loop

import peft_deploy
from peft_deploy.base import open_base
from peft_deploy.base.dygraph import load_model
from peft_deploy.bundle import Manifest
from peft_deploy.config.export import ExportOptions
from peft_deploy.runtime import initial_cache, open_runner
from peft_deploy.signature import past_names
from peft_deploy.text import Tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.convert]

PROMPT = "The capital of France is"
PARIS = 7042
STEPS = 16


@pytest.fixture(scope="module")
def adapter(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rank 8 on all linears; strong enough to change what the model says, weak enough to leave it words."""
    folder = tmp_path_factory.mktemp("real") / "adapter"
    return adapter_for(smollm2, folder, rank=8, spread=(0.02, 0.02))


@pytest.fixture(scope="module")
def bundle(smollm2: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("real") / "bundle"
    peft_deploy.export(smollm2, output, adapter=adapter)
    return output


def test_the_gate_passed_on_real_text_with_an_adapter_that_shows(bundle: Path) -> None:
    parity = Manifest.read(bundle).parity
    assert parity is not None and parity["passed"] is True
    assert parity["real_text"] is True
    assert parity["warnings"] == []


def test_greedy_tokens_in_plain_onnxruntime_are_those_of_paddle(
    smollm2: Path, adapter: Path, bundle: Path
) -> None:
    ids = Tokenizer.from_folder(smollm2).encode(PROMPT)
    model = load_model(open_base(smollm2))
    base_tokens, base_logits = paddle_loop(model, ids, STEPS)
    assert base_tokens[0] == PARIS
    tuned = peft_deploy.LoRAModel.from_pretrained(model, adapter).eval()
    want_tokens, want = paddle_loop(tuned, ids, STEPS)
    got_tokens, got = plain_loop(bundle, ids, STEPS)
    assert got_tokens == want_tokens
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
    effect = np.abs(want[0] - base_logits[0]).max()
    assert effect > 100 * np.abs(np.array(got) - want).max()


def test_merged_graph_is_the_base_models_own(smollm2: Path, bundle: Path, tmp_path: Path) -> None:
    peft_deploy.export(smollm2, tmp_path / "base", options=ExportOptions(validate=False))
    assert node_names(bundle) == node_names(tmp_path / "base")
    per_layer = [name for name, _ in node_names(bundle) if name.startswith("/model/layers.7/")]
    assert len(per_layer) <= 19


def test_tied_embeddings_are_stored_once(smollm2: Path, bundle: Path) -> None:
    config = json.loads((smollm2 / "config.json").read_text("utf-8"))
    assert config["tie_word_embeddings"] is True
    data, weights = bundle / "model.onnx.data", smollm2 / "model.safetensors"
    assert data.stat().st_size < 1.05 * weights.stat().st_size


def test_paddles_format_says_the_same(
    smollm2: Path, adapter: Path, bundle: Path, tmp_path: Path
) -> None:
    options = ExportOptions(format="paddle", validate=False)
    peft_deploy.export(smollm2, tmp_path / "out", adapter=adapter, options=options)
    prompts = [PROMPT, "Water boils at"]
    ours, onnx = (
        peft_deploy.load_bundle(folder).generate(prompts, max_new_tokens=STEPS)
        for folder in (tmp_path / "out", bundle)
    )
    assert [result.token_ids for result in ours] == [result.token_ids for result in onnx]
    ids = np.array([Tokenizer.from_folder(smollm2).encode(PROMPT)])
    feeds = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(ids.shape[1])[None],
    }
    logits = []
    for folder in (tmp_path / "out", bundle):
        runner = open_runner(folder)
        cache = dict(zip(past_names(30), initial_cache(runner.signature, 1), strict=True))
        logits.append(runner.run({**feeds, **cache})["logits"])
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-4 * np.abs(logits[1]).max())
