"""Adapters apart from the weights in other families than Llama: with biases, and without a cache.

The check of the export compares the graph without an adapter and with each one with PaddleNLP's own forward; here
the adapter's own merged bundle is the third side.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from model_recipes import load_recipe

import peft_deploy
from peft_deploy.bundle import Manifest
from peft_deploy.config.export import ExportOptions
from peft_deploy.runtime import OnnxRunner, Session
from peft_deploy.signature import ATTENTION_MASK, INPUT_IDS, POSITION_IDS

tiny = load_recipe("tiny")

pytestmark = pytest.mark.convert


@pytest.mark.parametrize(("name", "slots"), [("qwen2", 14), ("bert-classification", 12)])
def test_active_is_paddle_is_merged(name: str, slots: int, tmp_path: Path) -> None:
    base = tiny.make(tmp_path / "base", name)
    adapter = tiny.make_lora(tmp_path / "tuned", base)
    result = peft_deploy.export(
        base, tmp_path / "kept", adapter=adapter, options=ExportOptions(adapters="runtime")
    )
    assert result.parity is not None and result.parity.passed
    assert result.parity.parts["adapter tuned"].effect is not None
    assert not result.parity.parts["adapter tuned"].effect.is_blind
    graph = Manifest.read(tmp_path / "kept").graph
    assert len(graph["lora_slots"]["targets"]) == slots
    merged = ExportOptions(validate=False)
    peft_deploy.export(base, tmp_path / "merged", adapter=adapter, options=merged)
    session = Session(tmp_path / "kept")
    session.load_adapter("tuned")
    feeds = _feeds(session)
    off, active = session.run(feeds), session.run(feeds, adapter="tuned")
    want = OnnxRunner(tmp_path / "merged").run(feeds)
    for output, array in want.items():
        size = np.abs(array).max()
        np.testing.assert_allclose(active[output], array, atol=2e-5 * size)
    changed = max(np.abs(want[n] - off[n]).max() / np.abs(off[n]).max() for n in want)
    assert changed > 0.05


def _feeds(session: Session) -> dict[str, np.ndarray]:
    """Two rows of eleven tokens, and an empty cache."""
    feeds = {}
    for spec in session.signature.inputs:
        sizes = {"batch": 2, "sequence": 11, "past+sequence": 11, "past": 0}
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in spec.dims]
        feeds[spec.name] = np.zeros(shape, spec.dtype)
    feeds[INPUT_IDS] = np.random.default_rng(6).integers(3, 90, (2, 11))
    feeds[ATTENTION_MASK] += 1
    if POSITION_IDS in feeds:
        feeds[POSITION_IDS] += np.arange(11)
    return feeds
