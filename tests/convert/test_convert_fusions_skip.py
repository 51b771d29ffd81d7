"""Sums and their norms in one operator of onnxruntime: where it comes in, and equal results."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from peft_deploy.convert.fusions import run_fusions
from peft_deploy.convert.opset import CONTRIB, FUSED_OPSET
from peft_deploy.convert.postflight import check_graph
from peft_deploy.signature import GraphSignature, TensorSpec

E = 6
RNG = np.random.default_rng(0)
JOINED = {
    "RMSNormalization": "SkipSimplifiedLayerNormalization",
    "LayerNormalization": "SkipLayerNormalization",
}


def layer(norm: str, other: list[Any]) -> ir.Model:
    """``y = norm(x + a)`` and, as a layer goes on, ``z = (x + a) + y``; a is of the dimensions given."""
    weights = ["w"] if norm == "RMSNormalization" else ["w", "b"]
    nodes = [
        helper.make_node("Add", ["x", "a"], ["s"], name="/layers.0/Add"),
        helper.make_node(
            norm, ["s", *weights], ["y"], name=f"/layers.1/norm/{norm}", epsilon=1e-3
        ),
        helper.make_node("Add", ["s", "y"], ["z"], name="/layers.1/Add"),
    ]
    nodes[1].attribute.append(helper.make_attribute("axis", -1))
    value, kind = helper.make_tensor_value_info, TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", kind, ["B", "S", E]), value("a", kind, other)],
        [value(name, kind, ["B", "S", E]) for name in "yz"],
        [numpy_helper.from_array(RNG.random(E, np.float32), name) for name in weights],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return ir.from_proto(made)


def run(model: ir.Model, x: Any, a: Any) -> list[Any]:
    data = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    results: list[Any] = session.run(["y", "z"], {"x": x, "a": a})
    return results


def draw(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("norm", sorted(JOINED))
def test_a_sum_and_its_norm_become_one_operator_that_gives_both(norm: str) -> None:
    model = layer(norm, ["B", "S", E])
    given = draw(2, 3, E), draw(2, 3, E)
    before = run(model, *given)
    report = run_fusions(model, "ort")
    assert report.fused[JOINED[norm]] == 1
    joined, last = model.graph
    assert (joined.op_type, last.op_type) == (JOINED[norm], "Add")
    assert joined.name == f"/layers.1/norm/{JOINED[norm]}"
    assert [value.name for value in joined.outputs] == ["y", "", "", "s"]
    for got, wanted in zip(run(model, *given), before, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_standard_operators_alone_are_used_unless_asked() -> None:
    model = layer("RMSNormalization", ["B", "S", E])
    report = run_fusions(model, "onnx")
    assert not set(JOINED.values()) & set(report.fused)
    assert [node.domain for node in model.graph] == [""] * 3


@pytest.mark.parametrize("other", [[E], [1, "S", E], ["B", 1, E]])
def test_a_sum_that_broadcasts_stays(other: list[Any]) -> None:
    model = layer("LayerNormalization", other)
    report = run_fusions(model, "ort")
    assert report.fused["SkipLayerNormalization"] == 0
    assert [node.op_type for node in model.graph] == ["Add", "LayerNormalization", "Add"]


def test_results_that_are_not_read_pass_the_postflight_without_a_name() -> None:
    model = layer("RMSNormalization", ["B", "S", E])
    run_fusions(model, "ort")
    x, a, y, z = (TensorSpec(name, "float32", ("B", "S", E)) for name in "xayz")
    counts = check_graph(model, GraphSignature((x, a), (y, z)), FUSED_OPSET, domains=(CONTRIB,))
    assert counts["SkipSimplifiedLayerNormalization"] == 1
