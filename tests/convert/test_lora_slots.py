"""Slots for LoRA on small graphs, filled by onnxruntime and compared with numpy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import helper
from small_graphs import build_graph, random_weights

from peft_deploy.convert.linears import find_linears
from peft_deploy.convert.lora_slots import AddLoraSlotsPass, LoraSlots
from peft_deploy.convert.postflight import check_graph
from peft_deploy.convert.weight_file import WeightFile
from peft_deploy.errors import ConversionError
from peft_deploy.signature import GraphSignature, TensorSpec

SIGNATURE = GraphSignature(
    (TensorSpec("x", "float32", ("batch", "sequence", 6)),),
    (TensorSpec("y", "float32", ("batch", "sequence", 5)),),
)
Arrays = Mapping[str, np.ndarray]


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    shapes = {
        "layers.0.up.weight": (6, 8),
        "layers.0.up.bias": (8,),
        "layers.0.down.weight": (8, 6),
        "table.weight": (6, 6),
        "norm.weight": (6,),
        "head.weight": (6, 5),
    }
    return random_weights(shapes)


@pytest.fixture
def model(weights: Arrays) -> ir.Model:
    """y = head(relu(up(x)) · down + x · (table · table)), up with a bias."""
    nodes = [
        helper.make_node("MatMul", ["x", "layers.0.up.weight"], ["a"]),
        helper.make_node("Add", ["layers.0.up.bias", "a"], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "layers.0.down.weight"], ["d"]),
        helper.make_node("MatMul", ["table.weight", "table.weight"], ["t"]),
        helper.make_node("MatMul", ["x", "t"], ["e"]),
        helper.make_node("Mul", ["e", "norm.weight"], ["f"]),
        helper.make_node("Add", ["d", "f"], ["g"]),
        helper.make_node("MatMul", ["g", "head.weight"], ["y"]),
    ]
    return build_graph(nodes, weights, ["batch", "sequence", 5])


def expected(w: Arrays, x: np.ndarray, change: Arrays) -> np.ndarray:
    def linear(module: str, x: np.ndarray) -> np.ndarray:
        y = x @ w[f"{module}.weight"] + w.get(f"{module}.bias", 0)
        A = change.get(f"{module}.lora_A.weight")
        return y if A is None else y + x @ A @ change[f"{module}.lora_B.weight"]

    hidden = linear("layers.0.down", np.maximum(linear("layers.0.up", x), 0))
    table = w["table.weight"]
    return linear("head", hidden + x @ (table @ table) * w["norm.weight"])


def add(model: ir.Model, folder: Path, rank: int | None = None) -> LoraSlots:
    with WeightFile(folder / "data") as file:
        step = AddLoraSlotsPass(lambda linears: linears, file, rank)
        step(model)
    assert step.added is not None
    return step.added


def run(model: ir.Model, folder: Path, feeds: Arrays) -> Any:
    ir.save(model, folder / "model.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(folder / "model.onnx", options, ["CPUExecutionProvider"])
    assert [node.name for node in session.get_inputs()] == ["x"]
    return session.run(None, dict(feeds))[0]


def draw(slots: LoraSlots, ranks: list[int], weights: Arrays) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    change = {}
    for module, rank in zip(slots.modules, ranks, strict=True):
        inner, outer = weights[f"{module}.weight"].shape
        change[f"{module}.lora_A.weight"] = rng.normal(size=(inner, rank)).astype(np.float32)
        change[f"{module}.lora_B.weight"] = rng.normal(size=(rank, outer)).astype(np.float32)
    return change


def test_what_is_a_linear_layer(model: ir.Model) -> None:
    """Not a weight that is used twice, nor one that is no matrix; a bias belongs to its layer."""
    linears = find_linears(model.graph)
    assert list(linears) == ["layers.0.up", "layers.0.down", "head"]
    assert linears["layers.0.up"].shape == (6, 8)
    assert [linear.result.name for linear in linears.values()] == ["b", "d", "y"]


def test_every_layer_has_a_rank_of_its_own(
    model: ir.Model, weights: Arrays, tmp_path: Path
) -> None:
    x = np.random.default_rng(2).normal(size=(2, 3, 6)).astype(np.float32)
    plain = run(model, tmp_path, {"x": x})
    slots = add(model, tmp_path)
    assert slots.modules == ("layers.0.up", "layers.0.down", "head")
    counts = check_graph(model, SIGNATURE, 17, slots.names)
    assert counts == {"MatMul": 5 + 2 * 3, "Add": 2 + 3, "Relu": 1, "Mul": 1}
    np.testing.assert_array_equal(run(model, tmp_path, {"x": x}), plain)
    for ranks in ([1, 4, 2], [7, 1, 1], [3, 3, 3]):
        change = draw(slots, ranks, weights)
        wanted = expected(weights, x, change)
        np.testing.assert_allclose(
            run(model, tmp_path, {"x": x, **change}), wanted, atol=1e-5 * np.abs(wanted).max()
        )
        assert np.abs(wanted - plain).max() > 1


def test_one_layer_alone_leaves_the_others(
    model: ir.Model, weights: Arrays, tmp_path: Path
) -> None:
    slots = add(model, tmp_path)
    x = np.random.default_rng(2).normal(size=(1, 4, 6)).astype(np.float32)
    change = {n: a for n, a in draw(slots, [2, 2, 2], weights).items() if n.startswith("head")}
    np.testing.assert_allclose(
        run(model, tmp_path, {"x": x, **change}), expected(weights, x, change), atol=1e-4
    )


def test_a_fixed_rank_begins_with_zeros_that_all_slots_share(
    model: ir.Model, weights: Arrays, tmp_path: Path
) -> None:
    x = np.random.default_rng(2).normal(size=(2, 3, 6)).astype(np.float32)
    plain = run(model, tmp_path, {"x": x})
    slots = add(model, tmp_path, rank=3)
    assert (slots.rank, slots.dtype) == (3, "float32")
    np.testing.assert_array_equal(run(model, tmp_path, {"x": x}), plain)
    change = draw(slots, [3, 3, 3], weights)
    np.testing.assert_allclose(
        run(model, tmp_path, {"x": x, **change}), expected(weights, x, change), atol=1e-4
    )
    assert (tmp_path / "data").stat().st_size == 8 * 3 * 4
    with pytest.raises(Exception, match="invalid dimensions"):
        run(model, tmp_path, {"x": x, **draw(slots, [3, 2, 3], weights)})


def test_slots_that_nobody_asked_for_are_no_inputs(model: ir.Model, tmp_path: Path) -> None:
    slots = add(model, tmp_path)
    for wrong in ((), slots.names[:-1], (*slots.names, "prefix.0.key")):
        with pytest.raises(ConversionError, match="not the slots for adapters"):
            check_graph(model, SIGNATURE, 17, wrong)
    with pytest.raises(ConversionError, match="inputs that are not the signature's"):
        check_graph(model, GraphSignature((), SIGNATURE.outputs), 17, slots.names)
