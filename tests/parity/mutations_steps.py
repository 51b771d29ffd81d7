"""Faults of single steps of a decoder, in a graph whose operators are not fused (``--fuse none``)."""

from __future__ import annotations

import numpy as np
from bundle_edits import Edit, GraphEdit, attribute, operator, own_constant
from made_bundles import NOT_FUSED
from mutations import Mutation, in_graph

L1, ATTENTION = "llama.layers.1", "/model/layers.1/self_attn"
NORM = "/model/layers.1/input_layernorm"
HEAD_DIM = 10


def interleaved_groups(graph: GraphEdit) -> None:
    """Query head h reads key head h mod K in place of h div (H / K)."""
    order = np.array([0, 2, 4, 1, 3, 5])
    there, back = graph.constant(order), graph.constant(np.argsort(order))
    graph.on_input(f"{ATTENTION}/Reshape_3", 0, "Gather", there, axis=1)
    graph.on_output(f"{ATTENTION}/Reshape_4", 0, "Gather", back, axis=1)


def past_values_lost(graph: GraphEdit) -> None:
    """Attention reads zeros in place of the past's values; the cache is handed out as it should be."""
    name = f"{ATTENTION}/Unsqueeze_1"
    zero = graph.constant(0.0)
    nothing = graph.add(name, "Mul", "past_key_values.1.value", zero)
    new = graph.node(f"{ATTENTION}/Concat_3").input[1]
    graph.node(name).input[0] = graph.add(name, "Concat", nothing, new, axis=2)


def values_without_past(graph: GraphEdit) -> None:
    del graph.node(f"{ATTENTION}/Concat_3").input[0]


def infinite_mask(graph: GraphEdit) -> None:
    """-inf in place of the lowest number: a row that may attend to nothing gives NaN."""
    graph.set_weight("constant.6", np.array([np.inf], np.float32))
    name = "/model/Mul"
    allowed = "/model/And_output_0"
    lowest, zero = graph.constant(float("-inf")), graph.constant(0.0)
    value = graph.node(name).output[0]
    made = graph.add("/model/Gather", "Where", allowed, zero, lowest, name="/model/Where")
    node = graph.node("/model/layers.0/self_attn/Unsqueeze_2")  # both layers read its output
    assert node.input[0] == value
    node.input[0] = made


def frozen_batch(graph: GraphEdit) -> None:
    """The batch that was traced has become a number."""
    name = f"{ATTENTION}/Reshape_3"
    graph.node(name).input[1] = graph.constant(np.array([1, 2, 3, -1, HEAD_DIM]))


def step(
    name: str, edit: Edit, *, node: str = "", layer: str | None = None, runs: bool = True
) -> Mutation:
    return Mutation(name, NOT_FUSED, in_graph(edit), node, layer, runs=runs)


STEP_MUTATIONS = [
    step(
        "norm by the sum in place of the mean",
        operator(f"{NORM}/ReduceMean", "ReduceL1"),
        node=f"{NORM}/ReduceMean",
        layer=L1,
    ),
    # NaN at padding only, where the search does not look: it finds them where the cache has them
    step("mask of minus infinity", infinite_mask),
    step(
        "softmax over the queries",
        attribute(f"{ATTENTION}/Softmax", "axis", -2),
        node=f"{ATTENTION}/Softmax",
        layer=L1,
    ),
    step(
        "scores scaled with the square of the factor",
        own_constant(f"{ATTENTION}/Mul_8", 1, np.square),
        node=f"{ATTENTION}/Mul_8",
        layer=L1,
    ),
    step(
        "query heads read keys in turn",
        interleaved_groups,
        node=f"{ATTENTION}/Reshape_4",
        layer=L1,
    ),
    step(
        "values of the past read as zeros",
        past_values_lost,
        node=f"{ATTENTION}/Unsqueeze_1",
        layer=L1,
    ),
    step("values not joined with the past", values_without_past, runs=False),
    step("batch frozen at one", frozen_batch, runs=False),
]
