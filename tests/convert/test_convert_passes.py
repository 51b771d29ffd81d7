"""Each clean-up pass on a small graph: what it removes, what it must leave, and that results stay equal."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from peft_deploy.convert.passes.constant_folding import FoldConstantsPass
from peft_deploy.convert.passes.interface import ApplySignaturePass
from peft_deploy.convert.passes.neutral_arithmetic import RemoveNeutralArithmeticPass
from peft_deploy.convert.passes.node_names import NameNodesPass
from peft_deploy.convert.passes.provenance import MODULE, RecordModulesPass
from peft_deploy.convert.postflight import check_graph
from peft_deploy.errors import ConversionError
from peft_deploy.families import NameMap, NameRule
from peft_deploy.signature import GraphSignature, TensorSpec

F = TensorProto.FLOAT


def model(nodes: list[Any], constants: dict[str, Any], shape: Any = ("a", "b")) -> ir.Model:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", F, shape)],
        [helper.make_tensor_value_info("y", F, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return ir.from_proto(proto)


def run(m: ir.Model, x: Any) -> Any:
    proto = ir.to_proto(m)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def kinds(m: ir.Model) -> list[str]:
    return [node.op_type for node in m.graph]


def test_neutral_arithmetic_goes_and_the_rest_stays() -> None:
    nodes = [
        helper.make_node("Mul", ["x", "one"], ["a"]),
        helper.make_node("Add", ["zero", "a"], ["b"]),
        helper.make_node("Sub", ["zero", "b"], ["c"]),  # 0 - b is no neutral operation
        helper.make_node("Div", ["c", "one"], ["d"]),
        helper.make_node("Mul", ["d", "two"], ["y"]),
    ]
    constants = {"one": np.float32([1]), "zero": np.float32(0), "two": np.float32([2])}
    m = model(nodes, constants)
    for node in m.graph:  # as the pass that records shapes would have left them
        for value in node.outputs:
            value.shape = ir.Shape([None, None])
    x = np.float32([[1, 2], [3, 4]])
    before = run(m, x)
    RemoveNeutralArithmeticPass()(m)
    assert kinds(m) == ["Sub", "Mul"]
    np.testing.assert_array_equal(run(m, x), before)


def test_a_constant_that_may_raise_the_rank_is_left_alone() -> None:
    nodes = [helper.make_node("ReduceSum", ["x"], ["a"], keepdims=0),
             helper.make_node("Mul", ["a", "one"], ["y2"]),
             helper.make_node("Neg", ["y2"], ["y"])]  # fmt: skip
    m = model(nodes, {"one": np.float32([1])})
    RemoveNeutralArithmeticPass()(m)
    assert kinds(m) == ["ReduceSum", "Mul", "Neg"]
    assert run(m, np.ones((2, 2), "float32")).shape == (1,)


def test_a_neutral_node_that_makes_an_output_stays() -> None:
    m = model([helper.make_node("Mul", ["x", "one"], ["y"])], {"one": np.float32(1)})
    RemoveNeutralArithmeticPass()(m)
    assert kinds(m) == ["Mul"]


def test_constants_are_folded_through_chains() -> None:
    nodes = [
        helper.make_node("Squeeze", ["axis"], ["scalar"]),
        helper.make_node("Add", ["scalar", "scalar"], ["twice"]),
        helper.make_node("Cast", ["twice"], ["number"], to=F),
        helper.make_node("Mul", ["x", "number"], ["y"]),
    ]
    m = model(nodes, {"axis": np.int64([3])})
    FoldConstantsPass()(m)
    assert kinds(m) == ["Mul"]
    np.testing.assert_array_equal(run(m, np.float32([[1, 2]])), [[6, 12]])


def test_weights_are_not_folded() -> None:
    m = model(
        [
            helper.make_node("Transpose", ["w"], ["t"]),
            helper.make_node("MatMul", ["x", "t"], ["y"]),
        ],
        {"w": np.ones((40, 40), "float32")},
    )
    FoldConstantsPass()(m)
    assert kinds(m) == ["Transpose", "MatMul"]


def named_model() -> ir.Model:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p2o.pd_op.matmul.0.0"]),
        helper.make_node("Sigmoid", ["p2o.pd_op.matmul.0.0"], ["Sigmoid.1"]),
        helper.make_node("Mul", ["p2o.pd_op.matmul.0.0", "Sigmoid.1"], ["p2o.pd_op.silu.0.0"]),
        helper.make_node("Identity", ["p2o.pd_op.silu.0.0"], ["y"]),
    ]
    return model(nodes, {"w": np.ones((2, 2), "float32")})


OPERATIONS = {
    "pd_op.matmul": [{"module": "net.layers.0.gate", "shapes": [[-1, 2]]}],
    "pd_op.silu": [{"module": "net.layers.0", "shapes": [[-1, 2]]}],
}
NAMES = NameMap([NameRule("net.layers.{i}.gate.weight", "model.layers.{i}.gate.weight")])


def test_nodes_get_the_module_that_they_came_from() -> None:
    m = named_model()
    RecordModulesPass(OPERATIONS, NAMES)(m)
    modules = [node.metadata_props.get(MODULE) for node in m.graph]
    assert modules == ["model.layers.0.gate", "model.layers.0", "model.layers.0", None]
    assert m.graph[0].outputs[0].shape == ir.Shape([None, 2])
    NameNodesPass()(m)
    assert [node.name for node in m.graph] == [
        "/model/layers.0/gate/MatMul",
        "/model/layers.0/Sigmoid",
        "/model/layers.0/Mul",
        "/Identity",
    ]
    assert m.graph[0].outputs[0].name == "/model/layers.0/gate/MatMul_output_0"
    assert m.graph.outputs[0].name == "y"
    assert all(not node.metadata_props for node in m.graph)


def test_signature_is_applied_and_checked() -> None:
    m = model([helper.make_node("Neg", ["x"], ["fetch_name_0"])], {})
    m.graph.outputs[0].name = "fetch_name_0"
    m = ir.from_proto(
        helper.make_model(
            helper.make_graph(
                [helper.make_node("Neg", ["x"], ["fetch_name_0"])],
                "g",
                [helper.make_tensor_value_info("x", F, ["DynamicDimension.0", 4])],
                [helper.make_tensor_value_info("fetch_name_0", F, ["DynamicDimension.1", 4])],
            ),
            opset_imports=[helper.make_opsetid("", 17)],
            ir_version=8,
        )
    )
    signature = GraphSignature(
        (TensorSpec("x", "float32", ("batch", 4)),),
        (TensorSpec("logits", "float32", ("batch", 4)),),
    )
    ApplySignaturePass(signature)(m)
    assert [str(d) for d in m.graph.inputs[0].shape] == ["batch", "4"]
    assert m.graph.outputs[0].name == "logits"
    NameNodesPass()(m)
    assert check_graph(m, signature, 17) == {"Neg": 1}
    with pytest.raises(ConversionError, match="opset 17 instead of 18"):
        check_graph(m, signature, 18)
    wrong = GraphSignature((TensorSpec("ids", "float32", ("batch", 4)),), signature.outputs)
    with pytest.raises(ConversionError, match="inputs"):
        check_graph(m, wrong, 17)


def test_an_input_of_another_type_is_an_error() -> None:
    m = model([helper.make_node("Neg", ["x"], ["y"])], {})
    m.graph.outputs[0].name = "fetch_name_0"
    signature = GraphSignature(
        (TensorSpec("x", "int64", ("a", "b")),), (TensorSpec("y", "float32", ("a", "b")),)
    )
    with pytest.raises(Exception, match="x is FLOAT in the converted graph, not INT64"):
        ApplySignaturePass(signature)(m)


def test_postflight_finds_dangling_values_and_control_flow() -> None:
    m = model([helper.make_node("MatMul", ["x", "ghost"], ["y"])], {})
    signature = GraphSignature(
        (TensorSpec("x", "float32", ("a", "b")),), (TensorSpec("y", "float32", ("a", "b")),)
    )
    with pytest.raises(ConversionError, match="dangling value ghost"):
        check_graph(m, signature, 17)
