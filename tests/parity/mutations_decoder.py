"""Faults of a decoder's graph as an export writes it by default: mask, attention, cache, residuals.

Operators are fused there, so that much of what a rewrite can get wrong is an attribute or an input. Faults of the
single steps that are not to be seen in such a graph are in :mod:`mutations_steps`, those of rotary positions in
:mod:`mutations_positions`.
"""

from __future__ import annotations

import numpy as np
from bundle_edits import (
    Edit,
    GraphEdit,
    attribute,
    change,
    on_input,
    on_output,
    operator,
    rewire,
)
from mutations import Mutation, in_graph

L1, NODE = "llama.layers.1", "/model/layers.1"
ATTENTION, HEAD_DIM = f"{NODE}/self_attn/Attention", 10
QUERY_LENGTH, TOTAL_LENGTH = "/model/Cast_output_0", "/model/Cast_1_output_0"
QUERIES, KEYS, VALUES, MASK, PAST_KEYS, PAST_VALUES = range(6)  # inputs of Attention
FLOAT, FLOAT16 = 1, 10  # TensorProto.DataType


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


def half_precision(graph: GraphEdit) -> None:
    """The output of a module loses the digits that half precision has no room for."""
    name = f"{NODE}/mlp/down_proj/MatMul"
    graph.on_output(name, 0, "Cast", to=FLOAT16)
    graph.on_output(f"{name}.fault", 0, "Cast", to=FLOAT)


def quick_gelu(graph: GraphEdit) -> None:
    graph.on_input(f"{NODE}/mlp/Sigmoid", 0, "Mul", graph.constant(1.702))


def capped(graph: GraphEdit) -> None:
    graph.on_output("/lm_head/MatMul", 0, "Div", graph.constant(30.0))
    graph.on_output("/lm_head/MatMul.fault", 0, "Tanh")
    graph.on_output("/lm_head/MatMul.fault.fault", 0, "Mul", graph.constant(30.0))


def epsilons(graph: GraphEdit) -> None:
    """Of all norms."""
    names = [
        f"/model/layers.{i}/{m}_layernorm" for i in (0, 1) for m in ("input", "post_attention")
    ]
    for name in (*names, "/model/norm"):
        attribute(f"{name}/RMSNormalization", "epsilon", 1e-5)(graph)


def interleaved_groups(graph: GraphEdit) -> None:
    """Query head h reads key head h mod K in place of h div (H / K)."""
    columns = np.arange(6 * HEAD_DIM).reshape(6, HEAD_DIM)[[0, 2, 4, 1, 3, 5]].ravel()
    there, back = graph.constant(columns), graph.constant(np.argsort(columns))
    graph.on_input(ATTENTION, QUERIES, "Gather", there, axis=2)
    graph.on_output(ATTENTION, 0, "Gather", back, axis=2)


def exchanged_inputs(name: str, one: int, other: int) -> Edit:
    """An operator takes two of its inputs in each other's place."""

    def edit(graph: GraphEdit) -> None:
        inputs = graph.node(name).input
        inputs[one], inputs[other] = inputs[other], inputs[one]

    return edit


def exchanged_parts(name: str, one: int, other: int) -> Edit:
    """Two parts of what a packed layer gives go by each other's names."""

    def edit(graph: GraphEdit) -> None:
        outputs = graph.node(name).output
        outputs[one], outputs[other] = outputs[other], outputs[one]

    return edit


def without_mask(graph: GraphEdit) -> None:
    """One layer's attention sees everything."""
    graph.node(ATTENTION).input[MASK] = ""


def without_weight(graph: GraphEdit) -> None:
    """A norm's weight is taken for ones."""
    name = f"{NODE}/post_attention_layernorm/RMSNormalization"
    graph.node(name).input[1] = graph.constant(np.ones_like(graph.input_of(name)))


def llama(
    name: str, *edits: Edit, node: str = "", layer: str | None = None, cancels: bool = False
) -> Mutation:
    return Mutation(name, "llama", in_graph(*edits), node, layer, cancels=cancels)


NORM = f"{NODE}/input_layernorm/RMSNormalization"
GRAPH_MUTATIONS = [
    llama(
        "epsilon 1e-5 in place of 1e-6",
        epsilons,
        node="/model/layers.0/input_layernorm/RMSNormalization",
        layer="llama.layers.0",
    ),
    llama("epsilon 1e-3 in one norm", attribute(NORM, "epsilon", 1e-3), node=NORM, layer=L1),
    llama(
        "norm that takes the mean away", operator(NORM, "LayerNormalization"), node=NORM, layer=L1
    ),
    llama(
        "weight of a norm not used",
        without_weight,
        node=f"{NODE}/post_attention_layernorm/RMSNormalization",
        layer=L1,
    ),
    llama(
        "q not rotated",
        rewire(ATTENTION, QUERIES, f"{NODE}/self_attn/q_proj/MatMul_output_0"),
        node=ATTENTION,
        layer=L1,
    ),
    llama(
        "keys kept before the rotation",
        rewire(ATTENTION, KEYS, f"{NODE}/self_attn/k_proj/MatMul_output_0"),
        node=ATTENTION,
        layer=L1,
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
    llama("one layer without a mask", without_mask, node=ATTENTION, layer=L1),
    llama("attention not scaled", attribute(ATTENTION, "scale", 1.0), node=ATTENTION, layer=L1),
    llama(
        "attention scaled twice",
        attribute(ATTENTION, "scale", 1 / HEAD_DIM),
        node=ATTENTION,
        layer=L1,
    ),
    llama("scores capped at 3", attribute(ATTENTION, "softcap", 3.0), node=ATTENTION, layer=L1),
    llama("groups of heads interleaved", interleaved_groups, node=ATTENTION, layer=L1),
    llama(
        "keys and values of attention swapped",
        exchanged_inputs(ATTENTION, KEYS, VALUES),
        node=ATTENTION,
        layer=L1,
    ),
    llama(
        "keys and values of the past swapped",
        exchanged_inputs(ATTENTION, PAST_KEYS, PAST_VALUES),
        node=ATTENTION,
        layer=L1,
    ),
    llama(
        "values of the past lost",
        on_input(ATTENTION, PAST_VALUES, "Mul", 0.0),
        node=ATTENTION,
        layer=L1,
    ),
    llama(
        "cache of another layer read",
        rewire(ATTENTION, PAST_KEYS, "past_key_values.0.key"),
        node=ATTENTION,
        layer=L1,
    ),
    llama(
        "k and v of a packed layer swapped",
        exchanged_parts(f"{NODE}/self_attn/qkv_proj/Split", 1, 2),
        node=f"{NODE}/self_attn/qkv_proj/Split",
        layer=L1,
    ),
    llama(
        "gate and up of a packed layer swapped",
        exchanged_parts(f"{NODE}/mlp/gate_up_proj/Split", 0, 1),
        node=f"{NODE}/mlp/gate_up_proj/Split",
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
        rewire(f"{NODE}/Add_1", 0, f"{NODE}/post_attention_layernorm/RMSNormalization_output_0"),
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
]
