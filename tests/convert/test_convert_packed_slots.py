"""Slots on layers that share a packed matrix: each part its own, of any rank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import helper
from small_graphs import build_graph, random_weights

from peft_deploy.convert.adapter_bank import AddAdapterBankPass
from peft_deploy.convert.lora_slots import AddLoraSlotsPass, find_linears
from peft_deploy.convert.weight_file import WeightFile

SIZES = {"q": 4, "k": 2, "v": 3}
PACKED = {"layers.0.qkv": [f"layers.0.{part}" for part in SIZES]}
Arrays = dict[str, np.ndarray]


@pytest.fixture
def weights() -> Arrays:
    shapes = {
        "layers.0.qkv.weight": (6, 9),
        "layers.0.qkv.bias": (9,),
        "layers.0.out.weight": (9, 5),
    }
    return random_weights(shapes)


@pytest.fixture
def model(weights: Arrays) -> ir.Model:
    """y = out(v k q), whose parts come from one product."""
    sizes = np.array(list(SIZES.values()), np.int64)
    nodes = [
        helper.make_node("MatMul", ["x", "layers.0.qkv.weight"], ["a"]),
        helper.make_node("Add", ["a", "layers.0.qkv.bias"], ["b"]),
        helper.make_node("Split", ["b", "sizes"], ["q", "k", "v"], axis=-1),
        helper.make_node("Concat", ["v", "k", "q"], ["c"], axis=-1),
        helper.make_node("MatMul", ["c", "layers.0.out.weight"], ["y"]),
    ]
    return build_graph(nodes, {"sizes": sizes, **weights}, ["batch", "sequence", 5])


def expected(w: Arrays, x: np.ndarray, change: Arrays) -> np.ndarray:
    parts = np.split(x @ w["layers.0.qkv.weight"] + w["layers.0.qkv.bias"], [4, 6], -1)
    for i, part in enumerate(SIZES):
        A = change.get(f"layers.0.{part}.lora_A.weight")
        if A is not None:
            parts[i] = parts[i] + x @ A @ change[f"layers.0.{part}.lora_B.weight"]
    return np.concatenate(parts[::-1], -1) @ w["layers.0.out.weight"]


def run(model: ir.Model, feeds: Arrays) -> np.ndarray:
    data = ir.to_proto(model).SerializeToString()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, feeds)
    return np.asarray(result)


def drawn(modules: list[str], ranks: list[int]) -> Arrays:
    rng = np.random.default_rng(4)
    change = {}
    for module, rank in zip(modules, ranks, strict=True):
        out = SIZES[module.rpartition(".")[2]]
        change[f"{module}.lora_A.weight"] = rng.normal(size=(6, rank)).astype(np.float32)
        change[f"{module}.lora_B.weight"] = rng.normal(size=(rank, out)).astype(np.float32)
    return change


def test_the_layers_are_the_parts(model: ir.Model) -> None:
    found = find_linears(model.graph, PACKED)
    assert list(found) == ["layers.0.q", "layers.0.k", "layers.0.v", "layers.0.out"]
    assert [linear.shape for linear in found.values()] == [(6, 4), (6, 2), (6, 3), (9, 5)]
    assert [linear.result.name for linear in found.values()] == ["q", "k", "v", "y"]


def test_a_split_that_is_gone_leaves_no_layers(model: ir.Model) -> None:
    """A fusion may take the packed result as a whole: then nobody may think that there are slots."""
    assert list(find_linears(model.graph, {"layers.0.qkv": ["layers.0.q", "layers.0.k"]})) == [
        "layers.0.out"
    ]


def test_parts_have_ranks_of_their_own(model: ir.Model, weights: Arrays, tmp_path: Path) -> None:
    x = np.random.default_rng(2).normal(size=(2, 3, 6)).astype(np.float32)
    plain = run(model, {"x": x})
    with WeightFile(tmp_path / "w") as file:
        step = AddLoraSlotsPass(lambda found: found[:3], file, packed=PACKED)
        step(model)
    assert step.added is not None
    assert list(step.added.modules) == PACKED["layers.0.qkv"]
    np.testing.assert_array_equal(run(model, {"x": x}), plain)  # to the bit
    for modules, ranks in ((["q", "k", "v"], [1, 7, 3]), (["v"], [2]), (["q", "k"], [5, 5])):
        change = drawn([f"layers.0.{m}" for m in modules], ranks)
        result = run(model, {"x": x, **change})
        np.testing.assert_allclose(result, expected(weights, x, change), rtol=1e-4, atol=1e-4)
        assert np.abs(result - plain).max() > 0.1


def test_rows_of_a_batch_use_adapters_of_their_own(model: ir.Model, weights: Arrays) -> None:
    x = np.random.default_rng(3).normal(size=(3, 2, 6)).astype(np.float32)
    AddAdapterBankPass(lambda found: found[:3], PACKED)(model)
    change = drawn(PACKED["layers.0.qkv"], [2, 4, 1])
    banks = {
        name.replace(".weight", ".bank"): np.stack([np.zeros_like(array), array])
        for name, array in change.items()
    }
    result = run(model, {"x": x, "adapter_ids": np.array([1, 0, 1]), **banks})
    for row, own in enumerate((change, {}, change)):
        wanted = expected(weights, x[row], own)
        np.testing.assert_allclose(result[row], wanted, rtol=1e-4, atol=1e-4)
