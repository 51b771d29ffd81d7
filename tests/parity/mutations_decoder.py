"""Faults of a decoder's graph: mask, positions, attention, cache, residuals, precision."""

from __future__ import annotations

import numpy as np
from bundle_edits import (
    GraphEdit,
    attribute,
    change,
    on_input,
    on_output,
    operator,
    own_constant,
    rewire,
    shared_constant,
)
from mutations import Mutation, in_graph

L1, NODE, ATTENTION = "llama.layers.1", "/model/layers.1", "/model/layers.1/self_attn"
QUERY_LENGTH, TOTAL_LENGTH = "/model/Cast_output_0", "/model/Cast_1_output_0"
THETA, MAX_POSITIONS, HEAD_DIM = 10000.0, 64, 10
FLOAT, FLOAT16, INT64 = 1, 10, 7  # TensorProto.DataType


def tables(theta: float, graph: GraphEdit) -> None:
    """Cosines and sines of another base."""
    powers = theta ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = np.arange(MAX_POSITIONS)[:, None] * powers[None]
    for name, value in (("table.0", np.cos(angles)), ("table.1", np.sin(angles))):
        off = np.abs(graph.weight(name) - value).max()
        assert off < (1e-5 if theta == THETA else 1), name
        if theta != THETA:
            graph.set_weight(name, value)


def other_theta(graph: GraphEdit) -> None:
    tables(THETA, graph)  # these are the right ones
    tables(1.01 * THETA, graph)


def forward_mask(graph: GraphEdit) -> None:
    """Every token sees the next one, too."""
    graph.on_input("/model/LessOrEqual", 1, "Add", graph.constant(np.array(1)))


def no_causal_mask(graph: GraphEdit) -> None:
    graph.on_input("/model/LessOrEqual", 1, "Add", graph.constant(np.array(1000)))


def padding_ignored(graph: GraphEdit) -> None:
    """Every slot counts as a token's."""
    name = "/model/And"
    mask = graph.node(name).input[1]
    graph.node(name).input[1] = graph.add(name, "Or", mask, graph.add(name, "Not", mask))


def past_never_masked(graph: GraphEdit) -> None:
    """Padding in the past is seen; in the new tokens it is not."""
    name = "/model/And"
    keys = graph.node("/model/LessOrEqual").input[0]
    offset = graph.add(name, "Sub", TOTAL_LENGTH, QUERY_LENGTH)
    is_past = graph.add(name, "Less", keys, offset)
    graph.node(name).input[1] = graph.add(name, "Or", graph.node(name).input[1], is_past)


def own_positions(graph: GraphEdit) -> None:
    """Positions are counted from the past's length, whatever position_ids says."""
    value = graph.node("/model/Unsqueeze").input[0]  # [S], counted from P
    for name in ("/model/Gather", "/model/Gather_1"):
        zeros = graph.add(name, "Sub", "position_ids", "position_ids")
        graph.node(name).input[1] = graph.add(name, "Add", zeros, value)


def late_positions(graph: GraphEdit) -> None:
    """Positions are one too low where one token follows a past."""
    first = "/model/Gather"
    one = graph.constant(np.array(1))
    single = graph.add(first, "Equal", QUERY_LENGTH, one)
    longer = graph.add(first, "Greater", TOTAL_LENGTH, QUERY_LENGTH)
    decoding = graph.add(first, "And", single, longer)
    shift = graph.add(first, "Cast", decoding, to=INT64)
    moved = graph.add(first, "Sub", "position_ids", shift, name="/model/positions/Sub")
    for name in (first, "/model/Gather_1"):
        graph.node(name).input[1] = moved


def interleaved_rotary(graph: GraphEdit) -> None:
    """Neighbours are rotated with each other in place of the two halves."""
    order = np.concatenate([np.arange(0, HEAD_DIM, 2), np.arange(1, HEAD_DIM, 2)])
    there, back = graph.constant(order), graph.constant(np.argsort(order))
    for split, concat in (("Split", "Concat"), ("Split_1", "Concat_1")):
        graph.on_input(f"{ATTENTION}/{split}", 0, "Gather", there, axis=3)
        graph.on_output(f"{ATTENTION}/{concat}", 0, "Gather", back, axis=3)


def backward_rotary(graph: GraphEdit) -> None:
    """q and k are rotated the other way round: their products depend on the positions as before."""
    graph.on_input(f"{ATTENTION}/Mul_1", 1, "Neg")
    graph.on_input(f"{ATTENTION}/Mul_3", 1, "Neg")
    graph.on_input(f"{ATTENTION}/Mul_5", 1, "Neg")
    graph.on_input(f"{ATTENTION}/Mul_7", 1, "Neg")


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


def unrotated_cache(graph: GraphEdit) -> None:
    """The keys that are kept, and read, are those before the rotation."""
    graph.node(f"{ATTENTION}/Concat_2").input[1] = graph.node(f"{ATTENTION}/Split_1").input[0]


def rolled_rows(graph: GraphEdit) -> None:
    """Each row of the batch gets the next one's logits."""
    head = "/lm_head/MatMul"
    shape = graph.add(head, "Shape", "input_ids")
    zero, one = graph.constant(np.array(0)), graph.constant(np.array(1))
    rows = graph.add(head, "Gather", shape, zero, axis=0)
    order = graph.add(head, "Range", zero, rows, one)
    order = graph.add(head, "Mod", graph.add(head, "Add", order, one), rows)
    graph.on_output(head, 0, "Gather", order, axis=0)


def token_before(graph: GraphEdit) -> None:
    """Logits are those of the token before."""
    head = "/lm_head/MatMul"
    zero, one = graph.constant(np.array(0)), graph.constant(np.array(1))
    order = graph.add(head, "Range", zero, QUERY_LENGTH, one)
    order = graph.add(head, "Max", graph.add(head, "Sub", order, one), zero)
    graph.on_input(head, 0, "Gather", order, axis=1)


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


def half_precision(graph: GraphEdit) -> None:
    """The output of a module loses the digits that half precision has no room for."""
    name = f"{NODE}/mlp/down_proj/MatMul"
    graph.on_output(name, 0, "Cast", to=FLOAT16)
    graph.on_output(f"{name}.fault", 0, "Cast", to=FLOAT)


def quick_gelu(graph: GraphEdit) -> None:
    graph.on_input(f"{NODE}/mlp/Sigmoid", 0, "Mul", graph.constant(1.702))


def frozen_batch(graph: GraphEdit) -> None:
    """The batch that was traced has become a number."""
    name = f"{ATTENTION}/Reshape_3"
    graph.node(name).input[1] = graph.constant(np.array([1, 2, 3, -1, HEAD_DIM]))


def capped(graph: GraphEdit) -> None:
    graph.on_output("/lm_head/MatMul", 0, "Div", graph.constant(30.0))
    graph.on_output("/lm_head/MatMul.fault", 0, "Tanh")
    graph.on_output("/lm_head/MatMul.fault.fault", 0, "Mul", graph.constant(30.0))


def llama(
    name: str, *edits: object, node: str = "", layer: str | None = None, runs: bool = True
) -> Mutation:
    return Mutation(name, "llama", in_graph(*edits), node, layer, runs=runs)  # type: ignore[arg-type]


NORM = f"{NODE}/input_layernorm"
GRAPH_MUTATIONS = [
    llama(
        "epsilon 1e-5 in place of 1e-6",
        shared_constant("/model/norm/Add", 1, lambda e: 10 * e),
        node="/model/layers.0/input_layernorm/Add",
        layer="llama.layers.0",
    ),
    llama(
        "epsilon 1e-3 in one norm",
        own_constant(f"{NORM}/Add", 1, lambda e: 1000 * e),
        node=f"{NORM}/Add",
        layer=L1,
    ),
    llama(
        "norm by the sum in place of the mean",
        operator(f"{NORM}/ReduceMean", "ReduceL1"),
        node=f"{NORM}/ReduceMean",
        layer=L1,
    ),
    llama("rope theta off by 1 %", other_theta, node="/model/Gather"),
    llama(
        "positions off by one", change("table.0", lambda t: np.roll(t, 1, 0)), node="/model/Gather"
    ),
    llama("positions off by one only in decoding", late_positions, node="/model/positions/Sub"),
    llama("position_ids ignored", own_positions, node="/model/Gather"),
    llama(
        "rotary pairs interleaved in place of halves",
        interleaved_rotary,
        node=f"{ATTENTION}/Concat_1",
        layer=L1,
    ),
    llama("rotation backwards", backward_rotary, node=f"{ATTENTION}/Sub_1", layer=L1),
    llama(
        "q not rotated",
        rewire(f"{ATTENTION}/Reshape_3", 0, f"{ATTENTION}/Transpose_output_0"),
        node=f"{ATTENTION}/Reshape_3",
        layer=L1,
    ),
    llama(
        "keys kept before the rotation", unrotated_cache, node=f"{ATTENTION}/Concat_2", layer=L1
    ),
    llama(
        "causal mask off by one, backwards",
        operator("/model/LessOrEqual", "Less"),
        node="/model/LessOrEqual",
    ),
    llama("causal mask off by one, forwards", forward_mask, node="/model/LessOrEqual"),
    llama("no causal mask", no_causal_mask, node="/model/LessOrEqual"),
    llama("padding ignored", padding_ignored, node="/model/And"),
    llama("padding in the past ignored", past_never_masked, node="/model/And"),
    llama(
        "mask too weak (-8)",
        change("constant.6", lambda c: np.full_like(c, 8)),
        node="/model/Mul",
    ),
    # NaN at padding only, where the search does not look: it finds them where the cache has them
    llama("mask of minus infinity", infinite_mask),
    llama(
        "softmax over the queries",
        attribute(f"{ATTENTION}/Softmax", "axis", -2),
        node=f"{ATTENTION}/Softmax",
        layer=L1,
    ),
    llama(
        "attention not scaled",
        own_constant(f"{ATTENTION}/Mul_8", 1, np.ones_like),
        node=f"{ATTENTION}/Mul_8",
        layer=L1,
    ),
    llama(
        "attention scaled twice",
        own_constant(f"{ATTENTION}/Mul_8", 1, np.square),
        node=f"{ATTENTION}/Mul_8",
        layer=L1,
    ),
    llama(
        "groups of heads interleaved", interleaved_groups, node=f"{ATTENTION}/Reshape_4", layer=L1
    ),
    llama(
        "values of the past read as zeros",
        past_values_lost,
        node=f"{ATTENTION}/Unsqueeze_1",
        layer=L1,
    ),
    llama("values not joined with the past", values_without_past, runs=False),
    llama(
        "cache of another layer read",
        rewire(f"{ATTENTION}/Concat_2", 0, "past_key_values.0.key"),
        node=f"{ATTENTION}/Concat_2",
        layer=L1,
    ),
    llama(
        "cache outputs swapped between layers",
        lambda graph: graph.exchange_outputs("present.0.value", "present.1.value"),
        node="/present.1.value",
    ),
    llama(
        "key and value outputs swapped",
        lambda graph: graph.exchange_outputs("present.1.key", "present.1.value"),
        node="/present.1.value",
    ),
    llama(
        "residual around attention lost",
        on_input(f"{NODE}/Add", 0, "Mul", 0.0),
        node=f"{NODE}/Add",
        layer=L1,
    ),
    llama(
        "residual from behind the norm",
        rewire(f"{NODE}/Add_1", 0, f"{NODE}/post_attention_layernorm/Mul_2_output_0"),
        node=f"{NODE}/Add_1",
        layer=L1,
    ),
    llama("quick GELU in place of SiLU", quick_gelu, node=f"{NODE}/mlp/Sigmoid", layer=L1),
    llama(
        "tanh in place of the sigmoid",
        operator(f"{NODE}/mlp/Sigmoid", "Tanh"),
        node=f"{NODE}/mlp/Sigmoid",
        layer=L1,
    ),
    llama(
        "gate's output not used",
        rewire(f"{NODE}/mlp/Mul_1", 0, f"{NODE}/mlp/Sigmoid_output_0"),
        node=f"{NODE}/mlp/Mul_1",
        layer=L1,
    ),
    llama(
        "one module's output in half precision",
        half_precision,
        node=f"{NODE}/mlp/down_proj/MatMul.fault",
        layer=L1,
    ),
    llama("logits of the wrong row", rolled_rows, node="/lm_head/MatMul"),
    llama("logits of the token before", token_before, node="/lm_head/MatMul"),
    llama("logits capped at 30", capped, node="/lm_head/MatMul"),
    llama(
        "logits scaled by 1.0001",
        on_output("/lm_head/MatMul", 0, "Mul", 1.0001),
        node="/lm_head/MatMul",
    ),
    llama("batch frozen at one", frozen_batch, runs=False),
]
