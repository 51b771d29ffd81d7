"""New nodes, called after the module that they belong to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir


def new_node(operator: str, inputs: Sequence[ir.Value | None], folder: str) -> ir.Node:
    """A node ``FOLDER/OPERATOR`` with one result."""
    node = ir.Node("", operator, inputs, num_outputs=1, name=f"{folder}/{operator}")
    node.outputs[0].name = f"{node.name}_output_0"
    return node


def new_split(value: ir.Value, sizes: ir.Value, count: int, folder: str) -> ir.Node:
    """A node ``FOLDER/Split`` that cuts a value along its last axis.

    Args:
        value: to cut.
        sizes: how many columns each part has.
        count: of the parts.
        folder: begins the node's name.
    """
    node = ir.Node(
        "",
        "Split",
        [value, sizes],
        [ir.AttrInt64("axis", -1)],
        num_outputs=count,
        name=f"{folder}/Split",
    )
    for i, part in enumerate(node.outputs):
        part.name = f"{node.name}_output_{i}"
    return node


def split_sizes(graph: ir.Graph, sizes: Sequence[int]) -> ir.Value:
    """The constant that tells Split where to cut; one for all places that need the same."""
    name = f"sizes.{'.'.join(map(str, sizes))}"
    if name not in graph.initializers:
        tensor = ir.tensor(np.array(sizes, np.int64), name=name)
        graph.register_initializer(ir.val(name, const_value=tensor))
    return graph.initializers[name]
