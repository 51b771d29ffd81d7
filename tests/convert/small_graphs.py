"""Graphs of a few nodes with random weights, for passes that need no converter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx import NodeProto, TensorProto, helper, numpy_helper

F = TensorProto.FLOAT


def random_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def build_graph(
    nodes: Sequence[NodeProto], initializers: Mapping[str, np.ndarray], y: Sequence[str | int]
) -> ir.Model:
    """From x [batch, sequence, 6] to y of the given dimensions; nodes are called by their numbers."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", F, ["batch", "sequence", 6])],
        [helper.make_tensor_value_info("y", F, y)],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    loaded = ir.from_proto(proto)
    for i, node in enumerate(loaded.graph):
        node.name = f"node {i}"
    return loaded
