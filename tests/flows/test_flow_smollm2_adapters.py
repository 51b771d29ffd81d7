"""The real model with two adapters apart from its weights: three ways to the same tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from flows_adapter import adapter_for
from flows_loops import paddle_loop, plain_loop

import peft_deploy
from peft_deploy.base import open_base
from peft_deploy.base.dygraph import load_model
from peft_deploy.bundle import Manifest
from peft_deploy.config.export import ExportOptions
from peft_deploy.runtime import load_bundle
from peft_deploy.text import Tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.convert]

PROMPT = "The capital of France is"
STEPS = 16


@pytest.fixture(scope="module")
def adapters(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Rank 8 on all linears and rank 3 on two kinds of them; strong, but leaving the model its words."""
    folder = tmp_path_factory.mktemp("real")
    return {
        "everything": adapter_for(smollm2, folder / "everything", rank=8, spread=(0.02, 0.02)),
        "attention": adapter_for(
            smollm2,
            folder / "attention",
            rank=3,
            seed=12,
            spread=(0.1, 0.1),
            targets=r".*(q|v)_proj",
        ),
    }


@pytest.fixture(scope="module")
def bundle(
    smollm2: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("real") / "runtime"
    options = ExportOptions(adapters="runtime")
    peft_deploy.export(smollm2, output, adapter=list(adapters.values()), options=options)
    return output


def test_the_gate_passed_for_each_adapter(bundle: Path) -> None:
    manifest = Manifest.read(bundle)
    assert len(manifest.graph["lora_slots"]["targets"]) == 210
    assert manifest.parity is not None and manifest.parity["passed"] is True
    assert set(manifest.parity["parts"]) == {"adapter everything", "adapter attention"}
    for part in (manifest.parity, *manifest.parity["parts"].values()):
        assert part["real_text"] is True and part["warnings"] == []


@pytest.mark.parametrize("name", ["everything", "attention"])
def test_active_is_paddle_is_merged(
    name: str, smollm2: Path, adapters: dict[str, Path], bundle: Path, tmp_path: Path
) -> None:
    ids = Tokenizer.from_folder(smollm2).encode(PROMPT)
    model = load_model(open_base(smollm2))
    base_tokens, base = paddle_loop(model, ids, STEPS)
    tuned = peft_deploy.LoRAModel.from_pretrained(model, adapters[name]).eval()
    want_tokens, want = paddle_loop(tuned, ids, STEPS)
    del model, tuned
    assert want_tokens != base_tokens
    merged = ExportOptions(validate=False)
    peft_deploy.export(smollm2, tmp_path / "merged", adapter=adapters[name], options=merged)
    for tokens, logits in (
        plain_loop(bundle, ids, STEPS, bundle / "adapters" / f"{name}.onnx_adapter"),
        plain_loop(tmp_path / "merged", ids, STEPS),
    ):
        assert tokens == want_tokens
        np.testing.assert_allclose(logits, want, atol=1e-4 * np.abs(want).max())
    assert np.abs(want[0] - base[0]).max() > 100 * np.abs(np.array(logits) - want).max()
    loaded = load_bundle(bundle)
    result = loaded.generate(PROMPT, max_new_tokens=STEPS, adapter=name)
    assert list(result.token_ids) == want_tokens[: len(result.token_ids)]


def test_off_is_the_base_bundle_to_the_bit(smollm2: Path, bundle: Path, tmp_path: Path) -> None:
    peft_deploy.export(smollm2, tmp_path / "base", options=ExportOptions(validate=False))
    ids = Tokenizer.from_folder(smollm2).encode(PROMPT)
    want_tokens, want = plain_loop(tmp_path / "base", ids, STEPS)
    got_tokens, got = plain_loop(bundle, ids, STEPS)
    assert got_tokens == want_tokens
    np.testing.assert_array_equal(got, want)
