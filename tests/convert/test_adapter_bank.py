"""A bank of adapters on small graphs, filled by onnxruntime and compared with numpy row by row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import helper
from small_graphs import build_graph, random_weights

from peft_deploy.convert.adapter_bank import AddAdapterBankPass
from peft_deploy.convert.lora_slots import LoraSlots
from peft_deploy.convert.postflight import check_graph
from peft_deploy.errors import ConversionError
from peft_deploy.signature import GraphSignature, TensorSpec

SHAPES = {
    "layers.0.up.weight": (6, 8),
    "layers.0.up.bias": (8,),
    "layers.0.down.weight": (8, 6),
    "pooler.weight": (6, 5),
    "scale": (1,),
}
SIGNATURE = GraphSignature(
    (TensorSpec("x", "float32", ("batch", "sequence", 6)),),
    (TensorSpec("y", "float32", ("batch", 5)),),
)
Arrays = Mapping[str, np.ndarray]


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    return random_weights(SHAPES)


def build(weights: Arrays, first: list[object]) -> ir.Model:
    """y = pooler(first token of down(relu(up(x)))), up with a bias; the pooler gets one vector a row.

    ``first`` are nodes that make ``h`` of ``x``.
    """
    nodes = [
        *first,
        helper.make_node("MatMul", ["h", "layers.0.up.weight"], ["a"]),
        helper.make_node("Add", ["layers.0.up.bias", "a"], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "layers.0.down.weight"], ["d"]),
        helper.make_node("Gather", ["d", "zero"], ["e"], axis=1),
        helper.make_node("MatMul", ["e", "pooler.weight"], ["y"]),
    ]
    integers = {"zero": np.array(0), "three": np.array([-1, 1, 6])}
    return build_graph(nodes, {**weights, **integers}, ["batch", 5])


@pytest.fixture
def model(weights: Arrays) -> ir.Model:
    return build(weights, [helper.make_node("Mul", ["x", "scale"], ["h"])])


def expected(w: Arrays, x: np.ndarray, change: Arrays, ids: list[int]) -> np.ndarray:
    """One row after another, each with its entry's matrices."""

    def linear(module: str, x: np.ndarray, entry: int) -> np.ndarray:
        y = x @ w[f"{module}.weight"] + w.get(f"{module}.bias", 0)
        A, B = (change.get(f"{module}.lora_{half}.bank") for half in "AB")
        return y if A is None or B is None else y + x @ A[entry] @ B[entry]

    def row(x: np.ndarray, entry: int) -> np.ndarray:
        hidden = np.maximum(linear("layers.0.up", x * w["scale"], entry), 0)
        return linear("pooler", linear("layers.0.down", hidden, entry)[0], entry)

    return np.stack([row(one, entry) for one, entry in zip(x, ids, strict=True)])


def add(model: ir.Model) -> LoraSlots:
    step = AddAdapterBankPass(lambda linears: linears)
    step(model)
    assert step.added is not None
    return step.added


def run(model: ir.Model, folder: Path, feeds: Arrays) -> np.ndarray:
    ir.save(model, folder / "model.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(folder / "model.onnx", options, ["CPUExecutionProvider"])
    return np.asarray(session.run(None, dict(feeds))[0])


def draw(slots: LoraSlots, ranks: list[int], entries: int, seed: int = 4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    change = {}
    for module, rank in zip(slots.modules, ranks, strict=True):
        inner, outer = SHAPES[f"{module}.weight"]
        A = rng.normal(size=(entries, inner, rank)).astype(np.float32)
        B = rng.normal(size=(entries, rank, outer)).astype(np.float32)
        A[0] = 0
        change |= {f"{module}.lora_A.bank": A, f"{module}.lora_B.bank": B}
    return change


def test_each_row_has_its_own(model: ir.Model, weights: Arrays, tmp_path: Path) -> None:
    x = np.random.default_rng(2).normal(size=(4, 3, 6)).astype(np.float32)
    plain = run(model, tmp_path, {"x": x})
    slots = add(model)
    assert slots.modules == ("layers.0.up", "layers.0.down", "pooler")
    assert slots.names[-1] == "pooler.lora_B.bank"
    counts = check_graph(model, SIGNATURE.with_adapter_ids(), 17, slots.names)
    assert (counts["MatMul"], counts["Gather"], counts["Unsqueeze"]) == (3 + 6, 1 + 6, 1)
    off = run(model, tmp_path, {"x": x, "adapter_ids": np.zeros(4, np.int64)})
    np.testing.assert_array_equal(off, plain)
    for ids, ranks in (([2, 0, 1, 3], [1, 4, 2]), ([3, 3, 1, 0], [5, 1, 3]), ([0] * 4, [2] * 3)):
        change = draw(slots, ranks, entries=4)
        found = run(model, tmp_path, {"x": x, "adapter_ids": np.array(ids), **change})
        wanted = expected(weights, x, change, ids)
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
        changed = np.abs(wanted - plain).max(axis=1) > 0.1
        np.testing.assert_array_equal(changed, np.array(ids) != 0)


def test_a_batch_as_large_as_another_size(
    model: ir.Model, weights: Arrays, tmp_path: Path
) -> None:
    """A vector a row, were it multiplied as it is, would fit a batch of any size, and give nonsense."""
    slots = add(model)
    for batch in (1, 2, 5, 6):
        x = np.random.default_rng(batch).normal(size=(batch, 2, 6)).astype(np.float32)
        ids = [i % 3 for i in range(batch)]
        change = draw(slots, [2, 3, 2], entries=3)
        found = run(model, tmp_path, {"x": x, "adapter_ids": np.array(ids), **change})
        wanted = expected(weights, x, change, ids)
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ([helper.make_node("Transpose", ["x"], ["h"], perm=[1, 0, 2])], r"'sequence', 'batch', 6"),
        ([helper.make_node("Reshape", ["x", "three"], ["h"])], r"layers\.0\.up: \['\w+', 1, 6\]"),
    ],
    ids=["sequence first", "flattened"],
)
def test_rows_that_cannot_be_told_apart_are_refused(
    first: list[object], message: str, weights: Arrays
) -> None:
    model = build(weights, first)
    with pytest.raises(ConversionError, match=message) as caught:
        add(model)
    assert "--adapters runtime" in str(caught.value.hint)
