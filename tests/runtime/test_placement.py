"""Which provider runs which node, as onnxruntime says."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from peft_deploy.errors import ExecutionError
from peft_deploy.runtime import OnnxRunner
from peft_deploy.runtime.placement import RECORD, Node, Placement

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])
    nodes = [
        helper.make_node("Relu", ["x"], ["z"], "first"),
        helper.make_node("Exp", ["z"], ["y"], "second"),
    ]
    graph = helper.make_graph(nodes, "g", [x], [y])
    path = tmp_path / "model.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8),
        str(path),
    )
    return path


def recorded(model: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.add_session_config_entry(RECORD, "1")
    return ort.InferenceSession(str(model), options, providers=[CPU])


def test_onnxruntime_names_every_node_and_what_runs_it(model: Path) -> None:
    placement = Placement.of(recorded(model), CPU)
    assert placement.nodes == (Node("first", "Relu", CPU), Node("second", "Exp", CPU))
    assert placement.elsewhere == ()
    placement.require_any()
    assert str(placement) == f"2 of 2 nodes run on {CPU}"


def test_a_provider_that_runs_nothing_is_an_error(model: Path) -> None:
    placement = Placement.of(recorded(model), CUDA)
    assert [node.name for node in placement.elsewhere] == ["first", "second"]
    with pytest.raises(
        ExecutionError, match="CUDAExecutionProvider runs none of the graph's 2 nodes"
    ):
        placement.require_any()


def test_nodes_that_run_elsewhere_are_named_by_operator() -> None:
    there = [Node(f"m{i}", "MatMul", CUDA) for i in range(3)]
    here = [Node(f"s{i}", "Shape", CPU) for i in range(7)] + [Node("g", "Gather", CPU)]
    placement = Placement(CUDA, (*there, *here))
    placement.require_any()
    assert str(placement) == (
        f"3 of 11 nodes run on {CUDA}; the others: 7 Shape on {CPU} (s0, s1, s2, s3, s4 and 2 more); "
        f"1 Gather on {CPU} (g)"
    )


def test_on_the_cpu_nothing_is_recorded(model: Path) -> None:
    assert OnnxRunner(model).placement is None


def test_without_cuda_the_provider_is_refused(model: Path) -> None:
    if CUDA in ort.get_available_providers():
        pytest.skip("there is CUDA")
    with pytest.raises(ExecutionError, match="CUDAExecutionProvider is not available"):
        OnnxRunner(model, provider="cuda")
