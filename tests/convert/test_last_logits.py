"""Logits of the last token alone: the same numbers, or a clear error."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import NodeProto, helper
from small_graphs import build_graph, random_weights

from peft_deploy.convert.last_logits import LastLogitsPass
from peft_deploy.errors import ConversionError
from peft_deploy.signature import BATCH, LOGITS, SEQUENCE, GraphSignature, TensorSpec

node = helper.make_node
SIGNATURE = GraphSignature(
    (TensorSpec("x", "float32", (BATCH, SEQUENCE, 6)),),
    (TensorSpec(LOGITS, "float32", (BATCH, SEQUENCE, 11)),),
)
WEIGHTS = {"inner": (6, 6), "head": (6, 11), "table": (11, 6), "bias": (11,), "factor": ()}
INNER = [node("MatMul", ["x", "inner"], ["hidden"])]
HEADS = {
    "plain": [node("MatMul", ["hidden", "head"], [LOGITS])],
    "tied": [
        node("Transpose", ["table"], ["turned"], perm=[1, 0]),
        node("MatMul", ["hidden", "turned"], [LOGITS]),
    ],
    "capped": [
        node("MatMul", ["hidden", "head"], ["a"]),
        node("Add", ["bias", "a"], ["b"]),
        node("Div", ["b", "factor"], ["c"]),
        node("Tanh", ["c"], ["d"]),
        node("Mul", ["factor", "d"], [LOGITS]),
    ],
}


def graph_of(nodes: Sequence[NodeProto]) -> ir.Model:
    model = build_graph([*INNER, *nodes], random_weights(WEIGHTS), ["batch", "sequence", 11])
    model.graph.outputs[0] = next(v for n in model.graph for v in n.outputs if v.name == LOGITS)
    model.graph.outputs[0].shape = ir.Shape((BATCH, SEQUENCE, 11))
    model.graph.outputs[0].dtype = ir.DataType.FLOAT
    return model


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run([LOGITS], {"x": x})[0])


@pytest.mark.parametrize("kind", HEADS)
def test_the_last_tokens_numbers(kind: str) -> None:
    x = np.random.default_rng(3).standard_normal((3, 5, 6)).astype(np.float32)
    whole = run(graph_of(HEADS[kind]), x)
    model = graph_of(HEADS[kind])
    LastLogitsPass(SIGNATURE)(model)
    assert tuple(model.graph.outputs[0].shape or ()) == (BATCH, 1, 11)
    (cut,) = [n for n in model.graph if n.op_type == "Gather"]
    assert next(iter(cut.outputs[0].uses()))[0].op_type == "MatMul"
    for tokens in (5, 1):
        last = run(model, x[:, :tokens])
        assert last.shape == (3, 1, 11)
        np.testing.assert_allclose(last[:, 0], whole[:, tokens - 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "nodes",
    [
        [node("MatMul", ["hidden", "head"], ["a"]), node("Softmax", ["a"], [LOGITS])],
        [
            node("MatMul", ["hidden", "head"], ["a"]),
            node("MatMul", ["x", "head"], ["b"]),
            node("Add", ["a", "b"], [LOGITS]),
        ],
    ],
)
def test_what_is_no_head_is_refused(nodes: list[NodeProto]) -> None:
    with pytest.raises(ConversionError, match=r"cannot be computed: (Softmax|Add) \("):
        LastLogitsPass(SIGNATURE)(graph_of(nodes))
