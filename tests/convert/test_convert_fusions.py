"""Each fusion on a small graph: where it fires, where it must not, and that results stay equal."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from peft_deploy.convert.fusions import run_fusions
from peft_deploy.convert.opset import FUSED_OPSET, SAME_MEANING

F = TensorProto.FLOAT
Node = helper.make_node
RNG = np.random.default_rng(0)


def model(
    nodes: list[Any],
    constants: dict[str, Any],
    shape: Any = ("a", "b", 6),
    *,
    opset: int = 21,
    domains: tuple[str, ...] = (),
) -> ir.Model:
    for node in nodes:
        node.name = f"/layer/{node.output[0]}"
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", F, shape)],
        [helper.make_tensor_value_info("y", F, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=10))


def run(m: ir.Model, x: Any) -> Any:
    data = ir.to_proto(m).SerializeToString()
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def kinds(m: ir.Model) -> list[str]:
    return [node.op_type for node in m.graph]


def floats(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype("float32")


def rms_norm(*, root_first: bool = True, weight_last: bool = True, axes: int = -1) -> list[Any]:
    pairs = (["r", "x"] if root_first else ["x", "r"], ["n", "w"] if weight_last else ["w", "n"])
    return [
        Node("Mul", ["x", "x"], ["xx"]),
        Node("ReduceMean", ["xx", "axes"], ["m"], keepdims=1),
        Node("Add", ["m", "eps"], ["e"]),
        Node("Sqrt", ["e"], ["s"]),
        Node("Reciprocal", ["s"], ["r"]),
        Node("Mul", pairs[0], ["n"]),
        Node("Mul", pairs[1], ["y"]),
    ]


def rms_constants(weight: Any, axis: int = -1) -> dict[str, Any]:
    return {"axes": np.int64([axis]), "eps": np.float32(1e-3), "w": weight}


@pytest.mark.parametrize("root_first", [True, False])
@pytest.mark.parametrize("weight_last", [True, False])
def test_rms_norms_are_fused_in_any_order(root_first: bool, weight_last: bool) -> None:
    m = model(rms_norm(root_first=root_first, weight_last=weight_last), rms_constants(floats(6)))
    x = floats(2, 3, 6)
    before = run(m, x)
    report = run_fusions(m, "onnx")
    assert report.fused["RMSNormalization"] == 1
    assert report.plain == {}
    assert kinds(m) == ["RMSNormalization"]
    assert next(iter(m.graph)).name == "/layer/RMSNormalization"
    assert m.opset_imports[""] == FUSED_OPSET
    np.testing.assert_allclose(run(m, x), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("constants", "reason"),
    [
        (rms_constants(floats(3, 6)), "the weight is not known to be one number a channel"),
        (rms_constants(floats(6), axis=1), "the mean is not taken over the last axis"),
    ],
)
def test_what_only_looks_like_an_rms_norm_stays(constants: dict[str, Any], reason: str) -> None:
    m = model(rms_norm(), constants, (2, 3, 6))
    x = floats(2, 3, 6)
    before, nodes = run(m, x), kinds(m)
    report = run_fusions(m, "onnx")
    assert report.fused["RMSNormalization"] == 0
    assert report.plain["RMSNormalization"] == {reason: ["/layer"]}
    assert kinds(m) == nodes
    np.testing.assert_array_equal(run(m, x), before)


def test_a_step_that_something_else_reads_is_kept() -> None:
    nodes = [*rms_norm()[:-1], Node("Mul", ["n", "w"], ["z"]), Node("Add", ["z", "m"], ["y"])]
    m = model(nodes, rms_constants(floats(6)))
    x = floats(2, 3, 6)
    before = run(m, x)
    run_fusions(m, "onnx")
    np.testing.assert_allclose(run(m, x), before, rtol=1e-5, atol=1e-6)


ERF = {"root": np.float32(np.sqrt(2)), "one": np.float32(1), "half": np.float32(0.5)}
TANH = {
    "scale": np.float32(np.sqrt(2 / np.pi)),
    "cubic": np.float32([0.044715]),
    "one": np.float32(1),
    "half": np.float32([0.5]),
}


def gelu_erf() -> list[Any]:
    return [
        Node("Div", ["x", "root"], ["d"]),
        Node("Erf", ["d"], ["f"]),
        Node("Add", ["f", "one"], ["p"]),
        Node("Mul", ["x", "p"], ["q"]),
        Node("Mul", ["q", "half"], ["y"]),
    ]


def gelu_tanh() -> list[Any]:
    return [
        Node("Mul", ["x", "half"], ["h"]),
        Node("Mul", ["x", "x"], ["xx"]),
        Node("Mul", ["xx", "x"], ["xxx"]),
        Node("Mul", ["xxx", "cubic"], ["c"]),
        Node("Add", ["x", "c"], ["a"]),
        Node("Mul", ["a", "scale"], ["s"]),
        Node("Tanh", ["s"], ["t"]),
        Node("Add", ["t", "one"], ["p"]),
        Node("Mul", ["h", "p"], ["y"]),
    ]


@pytest.mark.parametrize(
    ("nodes", "constants", "approximate"),
    [(gelu_erf, ERF, "none"), (gelu_tanh, TANH, "tanh")],
)
def test_both_forms_of_gelu_are_fused(nodes: Any, constants: Any, approximate: str) -> None:
    m = model(nodes(), constants)
    x = floats(2, 3, 6) * 4
    before = run(m, x)
    report = run_fusions(m, "onnx")
    assert report.fused["Gelu"] == 1
    node = next(iter(m.graph))
    assert kinds(m) == ["Gelu"] and node.name == "/layer/Gelu"
    assert node.attributes["approximate"].as_string() == approximate
    np.testing.assert_allclose(run(m, x), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("nodes", "constants"),
    [
        (gelu_erf, ERF | {"root": np.float32(1.4141)}),
        (gelu_erf, ERF | {"half": np.full((1, 1, 1, 1), 0.5, "float32")}),  # it raises the rank
        (gelu_tanh, TANH | {"cubic": np.float32(0.0447)}),
        (gelu_tanh, TANH | {"one": floats(6)}),
    ],
)
def test_what_only_looks_like_gelu_stays(nodes: Any, constants: Any) -> None:
    m = model(nodes(), constants)
    x = floats(2, 3, 6)
    before, kept = run(m, x), kinds(m)
    report = run_fusions(m, "onnx")
    assert report.fused["Gelu"] == 0
    assert kinds(m) == kept
    np.testing.assert_array_equal(run(m, x), before)


@pytest.mark.parametrize(
    ("node", "opset", "domains", "reason"),
    [
        (Node("Det", ["x"], ["y"]), 21, (), "Det"),
        (Node("FastGelu", ["x"], ["y"], domain="com.microsoft"), 21, ("com.microsoft",), "FastG"),
        (Node("Relu", ["x"], ["y"]), 17, (), "of opset 17"),
    ],
)
def test_a_graph_of_unknown_operators_is_left_as_it_is(
    node: Any, opset: int, domains: tuple[str, ...], reason: str
) -> None:
    m = model([node], {}, opset=opset, domains=domains)
    report = run_fusions(m, "onnx")
    assert report.refused is not None and reason in report.refused
    assert report.fused == {}
    assert m.opset_imports[""] == opset
    assert report.to_dict()["not_fused"] == report.refused


def test_operators_that_are_declared_anew_are_defined_alike() -> None:
    """By the definitions in onnxruntime: equal inputs, outputs and attributes, and no type less."""
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

    found: dict[str, dict[int, Any]] = {}
    for schema in get_all_operator_schema():
        if schema.domain == "":
            found.setdefault(schema.name, {})[schema.since_version] = schema
    for name in sorted(SAME_MEANING):
        old, new = (
            found[name][max(v for v in found[name] if v <= at)] for at in (21, FUSED_OPSET)
        )
        assert not old.deprecated and not new.deprecated, name
        assert form(old) == form(new), name
        for before, after in zip(old.type_constraints, new.type_constraints, strict=True):
            assert set(before.allowed_type_strs) <= set(after.allowed_type_strs), name


def form(schema: Any) -> list[Any]:
    ends = [(p.name, str(p.option), p.typeStr) for p in (*schema.inputs, *schema.outputs)]
    return [
        len(schema.inputs),
        ends,
        sorted((key, str(a.type), a.required) for key, a in schema.attributes.items()),
    ]
