"""Graphs of rotary decoders: their size, their names, and inputs at the edges of what they can take."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from model_recipes import load_recipe

import peft_deploy
from peft_deploy.bundle import MODEL
from peft_deploy.config.export import ExportOptions
from peft_deploy.errors import ExecutionError
from peft_deploy.runtime import OnnxRunner
from peft_deploy.signature import ATTENTION_MASK, INPUT_IDS, LOGITS, POSITION_IDS

tiny = load_recipe("tiny")
MAX_NODES_PER_LAYER = 65
MAX_FUSED_NODES_PER_LAYER = 19
LAYER = re.compile(r"/model/layers\.(\d+)/.+")
FAMILIES = ("llama", "qwen2", "mistral", "gemma")
# Nodes of the projections: the first of a Llama layer, whose other nodes stand between them.
PROJECTIONS = [
    *(f"self_attn/{name}_proj/MatMul" for name in "qkvo"),
    *(f"mlp/{name}_proj/MatMul" for name in ("gate", "up", "down")),
]

pytestmark = pytest.mark.convert


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[tuple[str, str], Path] = {}

    def make(name: str, fuse: str = "onnx") -> Path:
        if (name, fuse) not in made:
            folder = tmp_path_factory.mktemp(name)
            base = tiny.make(folder / "base", name)
            options = ExportOptions(fuse=fuse, validate=False)
            peft_deploy.export(base, folder / "out", options=options)
            made[name, fuse] = folder / "out"
        return made[name, fuse]

    return make


def feeds(runner: OnnxRunner, mask: np.ndarray, new: int, start: int = 0) -> dict[str, np.ndarray]:
    """Random tokens and a random cache; positions are counted in the mask."""
    rng = np.random.default_rng(5)
    batch, total = mask.shape
    specs = runner.signature.past
    vocab = runner.signature.outputs[0].dims[-1]
    past = (batch, specs[0].dims[1], total - new, specs[0].dims[3])
    positions = np.maximum(mask.cumsum(-1) - 1, 0)[:, -new:] + start
    return {
        INPUT_IDS: rng.integers(0, vocab, (batch, new)),
        ATTENTION_MASK: mask,
        POSITION_IDS: positions,
        **{spec.name: rng.normal(size=past).astype(np.float32) for spec in specs},
    }


def test_a_llama_s_graph(bundle: Callable[..., Path]) -> None:
    graph = onnx.load(str(bundle("llama", "none") / MODEL), load_external_data=False).graph
    layers: dict[str, list[str]] = {}
    for node in graph.node:
        assert node.op_type not in {"If", "Loop", "Scan"}
        assert node.domain == ""
        if match := LAYER.fullmatch(node.name):
            layers.setdefault(match[1], []).append(node.name)
    assert sorted(layers) == ["0", "1"]
    for index, names in layers.items():
        assert len(names) <= MAX_NODES_PER_LAYER
        found = [name for name in names if name.endswith("_proj/MatMul")]
        assert found == [f"/model/layers.{index}/{name}" for name in PROJECTIONS]
        assert f"/model/layers.{index}/input_layernorm/ReduceMean" in names
        assert f"/model/layers.{index}/post_attention_layernorm/ReduceMean" in names
        assert f"/model/layers.{index}/self_attn/Softmax" in names
    names = [node.name for node in graph.node]
    assert {"/model/embed_tokens/Gather", "/model/norm/ReduceMean", "/lm_head/MatMul"} <= {*names}
    weights = {weight.name for weight in graph.initializer}
    assert "model.layers.1.self_attn.q_proj.weight" in weights
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            assert "DynamicDimension" not in dim.dim_param


def test_a_llama_s_fused_graph(bundle: Callable[..., Path]) -> None:
    model = onnx.load(str(bundle("llama") / MODEL), load_external_data=False)
    layers: dict[str, list[str]] = {}
    for node in model.graph.node:
        assert node.domain == ""
        if match := LAYER.fullmatch(node.name):
            layers.setdefault(match[1], []).append(node.name)
    for index, names in layers.items():
        layer = f"/model/layers.{index}"
        assert len(names) <= MAX_FUSED_NODES_PER_LAYER
        assert {
            f"{layer}/input_layernorm/RMSNormalization",
            f"{layer}/post_attention_layernorm/RMSNormalization",
            f"{layer}/self_attn/Attention",
        } <= {*names}
        assert sum("RotaryEmbedding" in name for name in names) == 2
    assert model.graph.node[-1].name == "/lm_head/MatMul"
    assert [(i.domain, i.version) for i in model.opset_import] == [("", 23)]


def test_fused_projections_keep_their_names(bundle: Callable[[str], Path]) -> None:
    graph = onnx.load(str(bundle("llama-fused") / MODEL), load_external_data=False).graph
    names = [node.name for node in graph.node if node.name.endswith("_proj/MatMul")]
    projections = ("self_attn/qkv", "self_attn/o", "mlp/gate_up_fused", "mlp/down")
    assert names == [f"/model/layers.{i}/{p}_proj/MatMul" for i in (0, 1) for p in projections]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_of_padding_alone_harms_nobody(name: str, bundle: Callable[[str], Path]) -> None:
    runner = OnnxRunner(bundle(name), threads=1)
    mask = np.ones((3, 9), np.int64)
    mask[1] = 0
    given = feeds(runner, mask, new=5)
    outputs = runner.run(given)
    assert all(np.isfinite(array).all() for array in outputs.values())
    for row in (0, 2):
        alone = runner.run({key: array[row : row + 1] for key, array in given.items()})
        for key, array in alone.items():
            np.testing.assert_allclose(outputs[key][row : row + 1], array, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_positions_past_the_table(name: str, bundle: Callable[[str], Path]) -> None:
    runner = OnnxRunner(bundle(name), threads=1)
    last = tiny.config_of(name)["max_position_embeddings"] - 1
    mask = np.ones((2, 4), np.int64)
    outputs = runner.run(feeds(runner, mask, new=4, start=last - 3))
    assert all(np.isfinite(array).all() for array in outputs.values())
    with pytest.raises(ExecutionError, match=f"position_ids .* {last + 1}; the last .* {last}"):
        runner.run(feeds(runner, mask, new=4, start=last - 2))


def test_a_text_longer_than_mistral_s_window(bundle: Callable[[str], Path]) -> None:
    """PaddleNLP's Mistral attends to all of it, and so does the graph."""
    runner = OnnxRunner(bundle("mistral"), threads=1)
    window = tiny.config_of("mistral")["sliding_window"]
    given = feeds(runner, np.ones((1, 4 * window), np.int64), new=4 * window)
    outputs = runner.run(given)
    assert all(np.isfinite(array).all() for array in outputs.values())
    other = (given[INPUT_IDS][:, :1] + 1) % 131
    given[INPUT_IDS] = np.concatenate([other, given[INPUT_IDS][:, 1:]], 1)
    changed = runner.run(given, [LOGITS])[LOGITS]
    assert np.abs(changed - outputs[LOGITS])[0, -1].max() > 1e-3
