"""Graphs that read quantized weights: linear layers, a table that a head shares, and what stays float."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from peft_deploy.convert.bind import bind_weights, is_stored
from peft_deploy.convert.fusions.shapes import known_shapes
from peft_deploy.convert.graph import ConvertedGraph
from peft_deploy.convert.lora_slots import AddLoraSlotsPass
from peft_deploy.convert.precision import QuantizedWeights, ReadQuantizedPass
from peft_deploy.convert.weight_file import WeightFile, stream_weights
from peft_deploy.errors import ConversionError
from peft_deploy.progress import Silent
from peft_deploy.runtime import OnnxRunner
from peft_deploy.runtime.exact_arithmetic import exact_arithmetic
from peft_deploy.weights import BlockQuantized, EncodedTensors, StoragePlan, TensorInfo

VOCABULARY, WIDTH = 50, 64
GRAPH = """
<ir_version: 10, opset_import: ["" : 21]>
g (int64[batch, tokens] ids) => (float[batch, tokens, 50] logits)
{
    hidden = Gather <axis = 0> (table, ids)
    up = MatMul(hidden, up_weight)
    active = Relu(up)
    down = MatMul(active, down_weight)
    sum = Add(hidden, down)
    turned = Transpose <perm = [1, 0]> (table)
    logits = MatMul(sum, turned)
}
"""
SHAPES = {
    "table.weight": (VOCABULARY, WIDTH),
    "layers.0.up.weight": (WIDTH, 40),  # 40 is no multiple of a block's 32
    "layers.0.down.weight": (40, WIDTH),
}
PLAN: StoragePlan = {
    "table.weight": BlockQuantized(8, rows=True),
    "layers.0.up.weight": BlockQuantized(4),
    "layers.0.down.weight": BlockQuantized(4),
}
IDS = np.array([[3, 49, 0], [7, 7, 1]])


class Weights:
    """Random ones."""

    def names(self) -> list[str]:
        return list(SHAPES)

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(name, "float32", SHAPES[name])

    def read(self, name: str) -> np.ndarray:
        rng = np.random.default_rng(list(SHAPES).index(name))
        return rng.normal(size=SHAPES[name]).astype(np.float32)


@dataclass(frozen=True)
class OneTensor:
    """Of ones."""

    tensor: TensorInfo

    def names(self) -> list[str]:
        return [self.tensor.name]

    def info(self, name: str) -> TensorInfo:
        return self.tensor

    def read(self, name: str) -> np.ndarray:
        return np.ones(self.tensor.shape, np.float32)


def decoded(name: str, plan: StoragePlan) -> np.ndarray:
    weight = Weights().read(name)
    if name not in plan:
        return weight
    return plan[name].decode(plan[name].encode(weight, name), weight.shape)


def computed(plan: StoragePlan, ids: np.ndarray) -> np.ndarray:
    table, up, down = (decoded(name, plan).astype(np.float64) for name in SHAPES)
    hidden = table[ids]
    return (hidden + np.maximum(hidden @ up, 0) @ down) @ table.T


def build(
    folder: Path, plan: StoragePlan, text: str = GRAPH, *, slots: bool = False
) -> tuple[ir.Model, QuantizedWeights, Path]:
    model = ir.from_onnx_text(text)
    parameters = dict(zip(("table", "up_weight", "down_weight"), SHAPES, strict=True))
    converted = ConvertedGraph(model, parameters, dict(SHAPES), {}, {}, {})
    with WeightFile(folder / "model.onnx.data") as file:
        stream_weights(EncodedTensors(Weights(), plan), file, Silent())
        bind_weights(converted, file, lambda name: name)
        if slots:
            AddLoraSlotsPass(lambda modules: [m for m in modules if m.startswith("layers")], file)(
                model
            )
        reading = ReadQuantizedPass(file)
        reading(model)
    path = folder / "model.onnx"
    ir.save(model, path)
    assert reading.done is not None
    return model, reading.done, path


def off(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def test_the_graph_computes_with_the_decoded_weights(tmp_path: Path) -> None:
    model, done, path = build(tmp_path, PLAN)
    operators = [node.op_type for node in model.graph]
    assert operators == [
        "GatherBlockQuantized",
        "MatMulNBits",
        "Relu",
        "MatMulNBits",
        "Add",
        "MatMulNBits",
    ]
    assert done.to_dict()["weights"] == {
        "int8": ["table.weight"],
        "int4": ["layers.0.up.weight", "layers.0.down.weight"],
    }
    assert done.float32 == []
    assert not any(is_stored(value) for value in model.graph.initializers.values())
    with exact_arithmetic():
        exact = OnnxRunner(path).run({"ids": IDS})["logits"]
    assert off(exact, computed(PLAN, IDS)) < 1e-6
    rounded = OnnxRunner(path).run({"ids": IDS})["logits"]
    assert 1e-4 < off(rounded, computed(PLAN, IDS)) < 3e-2  # activations in int8


def test_shapes_are_inferred_beside_small_ones(tmp_path: Path) -> None:
    """onnx-ir writes small initializers out for that; these have no contents of their own."""
    info = TensorInfo("small", "float32", (32, 4))
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (float[batch, 32] x) => (float[batch, 4] y) { z = MatMul(x, small) y = Relu(z) }"""
    )
    storage = BlockQuantized(8)
    with WeightFile(tmp_path / "model.onnx.data") as file:
        stream_weights(EncodedTensors(OneTensor(info), {"small": storage}), file, Silent())
        converted = ConvertedGraph(model, {"small": "small"}, {"small": (32, 4)}, {}, {}, {})
        bind_weights(converted, file, lambda name: name)
        with known_shapes(model):
            assert list(model.graph.node(0).outputs[0].shape or ()) == ["batch", 4]
        assert [value.name for value in model.graph.inputs] == ["x"]
        assert is_stored(model.graph.initializers["small"]) is not None


def test_the_table_lies_in_the_file_once(tmp_path: Path) -> None:
    model, _, path = build(tmp_path, PLAN)
    head, table = (
        model.graph.initializers[f"table.weight.quantized{suffix}"].const_value
        for suffix in ("", ".table")
    )
    assert isinstance(head, ir.ExternalTensor) and isinstance(table, ir.ExternalTensor)
    assert (head.offset, head.length) == (table.offset, table.length)
    assert list(table.shape) == [VOCABULARY, WIDTH]
    assert path.with_name("model.onnx.data").stat().st_size < 20_000


def test_slots_stay_in_float_and_add_what_they_hold(tmp_path: Path) -> None:
    _, _, path = build(tmp_path, PLAN, slots=True)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    slots = {node.name: node.type for node in session.get_overridable_initializers()}
    assert slots == {
        f"layers.0.{module}.lora_{half}.weight": "tensor(float)"
        for module in ("up", "down")
        for half in "AB"
    }
    rng = np.random.default_rng(5)
    A, B = rng.normal(size=(WIDTH, 3)), rng.normal(size=(3, 40))
    given = {"layers.0.up.lora_A.weight": A, "layers.0.up.lora_B.weight": B}
    with exact_arithmetic():
        runner = OnnxRunner(path)
    plain = runner.run({"ids": IDS})["logits"]
    assert off(plain, computed(PLAN, IDS)) < 1e-6
    values = {
        name: ort.OrtValue.ortvalue_from_numpy(value.astype(np.float32))
        for name, value in given.items()
    }
    adapted = runner.with_slots(values).run({"ids": IDS})["logits"]
    table, up, down = (decoded(name, PLAN).astype(np.float64) for name in SHAPES)
    hidden = table[IDS]
    wanted = (hidden + np.maximum(hidden @ (up + A @ B), 0) @ down) @ table.T
    assert off(adapted, wanted) < 1e-6
    assert off(plain, wanted) > 1e-2


def test_what_is_not_in_the_plan_stays_float_and_is_named(tmp_path: Path) -> None:
    plan = {"layers.0.up.weight": BlockQuantized(4)}
    model, done, path = build(tmp_path, plan)
    assert done.float32 == ["table.weight", "layers.0.down.weight"]
    with exact_arithmetic():
        assert off(OnnxRunner(path).run({"ids": IDS})["logits"], computed(plan, IDS)) < 1e-6
    assert sum(node.op_type == "MatMulNBits" for node in model.graph) == 1


def test_a_weight_that_is_read_in_another_way_is_an_error(tmp_path: Path) -> None:
    twice = GRAPH.replace(
        "active = Relu(up)", "more = Add(up, up)\n    active = Relu(more)"
    ).replace(
        "sum = Add(hidden, down)",
        "odd = MatMul(up_weight, down_weight)\n    sum = Add(hidden, down)",
    )
    with pytest.raises(
        ConversionError, match=r"layers.0.up.weight is stored as int4, and .* cannot read it so"
    ):
        build(tmp_path, PLAN, twice)
