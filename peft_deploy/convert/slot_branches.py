"""Inputs with a default, and the branches that they begin, beside the linear layers of a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from peft_deploy.convert.linears import Linear, SameInput
from peft_deploy.convert.nodes import new_node, new_split
from peft_deploy.convert.passes.node_names import module_folder
from peft_deploy.signature import LORA_RANKS

# Of a slot's name and dimensions, what it holds without an adapter.
Default = Callable[[str, tuple[int | str, ...]], ir.TensorProtocol]


@dataclass(frozen=True)
class EmptyDefault:
    """An empty tensor in the graph itself, or zeros where no dimension is open."""

    dtype: np.dtype[Any]

    def __call__(self, name: str, dims: tuple[int | str, ...]) -> ir.TensorProtocol:
        """The tensor."""
        sizes = [dim if isinstance(dim, int) else 0 for dim in dims]
        return ir.tensor(np.zeros(sizes, self.dtype), name=name)


def add_slot(
    graph: ir.Graph, name: str, dims: tuple[int | str, ...], default: Default
) -> ir.Value:
    """A new input of the graph with a default, the last one so far."""
    tensor = default(name, dims)
    value = ir.Value(
        name=name, shape=ir.Shape(dims), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.inputs.append(value)
    graph.register_initializer(value)
    return value


def add_ranks(graph: ir.Graph, group: SameInput) -> ir.Value:
    """The slot that says how many columns of a joint A belong to which layer; none by default."""
    dims = (len(group.linears),)
    return add_slot(graph, group.name + LORA_RANKS, dims, EmptyDefault(np.dtype(np.int64)))


def split_product(
    graph: ir.Graph, group: SameInput, product: ir.Value, sizes: ir.Value
) -> list[ir.Value]:
    """Each layer's part of what a joint A gives.

    Args:
        graph: with the layers.
        group: the layers.
        product: x · A.
        sizes: how many columns are whose.
    """
    folder = f"{module_folder(group.name)}/lora_A"
    split = new_split(product, sizes, len(group.linears), folder)
    begin_branches(graph, group, [split])
    return list(split.outputs)


def begin_branches(graph: ir.Graph, group: SameInput, nodes: Sequence[ir.Node]) -> None:
    """Inserts what all branches of some layers begin with, in front of the first of them."""
    producer = group.result.producer()
    assert producer is not None  # a layer's result is computed
    graph.insert_before(producer, nodes)


def add_branch(graph: ir.Graph, linear: Linear, branch: Sequence[ir.Node], folder: str) -> None:
    """Adds what the last node of a branch gives to a layer's result, wherever that is used.

    Args:
        graph: with the layer.
        linear: the layer.
        branch: new nodes in order.
        folder: begins the name of the node that adds.
    """
    users = list(linear.result.uses())
    total = new_node("Add", [linear.result, branch[-1].outputs[0]], f"{folder}/lora")
    producer = linear.result.producer()
    assert producer is not None  # a layer's result is computed
    graph.insert_after(producer, [*branch, total])
    for user in users:
        user.node.replace_input_with(user.idx, total.outputs[0])
    _take_over_output(graph, linear.result, total.outputs[0])


def _take_over_output(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """A layer whose result leaves the graph, such as the head: the name goes over to the sum."""
    for index, value in enumerate(graph.outputs):
        if value is old:
            name = old.name
            old.name, new.name = f"{name}.base", name
            new.shape, new.type = old.shape, old.type
            graph.outputs[index] = new
