"""Faults of weights: not the right ones, not in the right place, not in the right order."""

from __future__ import annotations

import numpy as np
from bundle_edits import Array, Edit, GraphEdit, change, exchange
from mutation_subjects import Subject
from mutations import Break, Mutation, in_graph, with_subject

from peft_deploy.parity.cases import IntArray

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 10
L1, LAST = "llama.layers.1", "model.layers.1"
NODE1 = "/model/layers.1"


def weight(module: str) -> str:
    return f"{LAST}.{module}.weight"


def of(module: str) -> str:
    """The operator of that module's weight."""
    return f"{NODE1}/{module.replace('.', '/')}/MatMul"


def one(module: str, name: str, value: object) -> Mutation:
    """A fault of one weight of the second layer."""
    edit = change(weight(module), value)  # type: ignore[arg-type]
    return Mutation(name, "llama", in_graph(edit), of(module), L1)


def element(row: int, column: int, factor: float) -> object:
    def changed(array: Array) -> Array:
        array[row, column] *= factor
        return array

    return changed


def flipped_bit(array: Array) -> Array:
    """The highest bit of the fraction of one element."""
    bits = array.view(np.uint32)
    bits[7, 11] ^= 1 << 22
    return array


def truncated(array: Array) -> Array:
    """To bfloat16, by cutting."""
    return (array.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def interleaved(array: Array, heads: int) -> Array:
    """Columns of each head in the order in which another convention pairs them for the rotation."""
    parts = array.reshape(len(array), heads, 2, HEAD_DIM // 2)
    return parts.swapaxes(2, 3).reshape(array.shape)


def heads_swapped(array: Array) -> Array:
    """The first two heads' columns change places."""
    parts = array.reshape(len(array), -1, HEAD_DIM).copy()
    parts[:, [0, 1]] = parts[:, [1, 0]]
    return parts.reshape(array.shape)


def repeated(graph: GraphEdit) -> None:
    """The second layer gets all weights of the first one."""
    for name in graph.weights:
        if name.startswith("model.layers.1."):
            graph.set_weight(name, graph.weight(name.replace("layers.1", "layers.0")))


def embedding_row(is_read: bool, name: str = "model.embed_tokens.weight") -> Break:
    """The row of a token that some text has, or that none has, and that the bundle does not write."""

    def edit(subject: Subject, graph: GraphEdit) -> None:
        table = graph.weight(name)
        seen = tokens_of(subject)
        unseen = np.setdiff1d(np.arange(len(table)), seen)
        table[seen[0] if is_read else unseen[0]] *= 2
        graph.set_weight(name, table)

    return with_subject(edit)


def tokens_of(subject: Subject) -> IntArray:
    """Every token that the check feeds into the graph."""
    kept = subject.recording
    ids = [text.ids for text in kept.expectation.matrix.texts]
    ids += [np.array(prompt.ids) for prompt in kept.prompts]
    ids += [scores.tokens for scores in kept.scores]
    ids += [np.array([case.pad_id]) for case in kept.expectation.matrix.cases]
    return np.unique(np.concatenate(ids))


def rows_exchanged(first: int, second: int) -> object:
    def changed(array: Array) -> Array:
        array[[first, second]] = array[[second, first]]
        return array

    return changed


def columns_exchanged(array: Array) -> Array:
    array[:, [3, 4]] = array[:, [4, 3]]
    return array


def rope_row(row: int) -> Edit:
    """The rotation at one position only."""

    def edit(graph: GraphEdit) -> None:
        table = graph.weight("table.1")
        table[row] = -table[row]
        graph.set_weight("table.1", table)

    return edit


NORM, POST = "input_layernorm", "post_attention_layernorm"
WEIGHT_MUTATIONS = [
    one("self_attn.o_proj", "square weight transposed", np.transpose),
    one("mlp.down_proj", "one weight rounded to half precision", lambda w: w.astype(np.float16)),
    one("self_attn.q_proj", "one weight cut to bfloat16", truncated),
    one("self_attn.v_proj", "one weight scaled by 1.001", lambda w: 1.001 * w),
    one("self_attn.v_proj", "one element of a weight lost", element(3, 5, 0.0)),
    one("mlp.up_proj", "one bit of a weight flipped", flipped_bit),
    one("mlp.gate_proj", "rows of a weight shifted by one", lambda w: np.roll(w, 1, 0)),
    Mutation(
        "q and k in another convention of rotary pairs",
        "llama",
        in_graph(
            change(weight("self_attn.q_proj"), lambda w: interleaved(w, HEADS)),
            change(weight("self_attn.k_proj"), lambda w: interleaved(w, KV_HEADS)),
        ),
        of("self_attn.q_proj"),
        L1,
    ),
    one("self_attn.q_proj", "two heads of q swapped", heads_swapped),
    one("self_attn.v_proj", "the two heads of v swapped", heads_swapped),
    Mutation(
        "k and v swapped",
        "llama",
        in_graph(exchange(weight("self_attn.k_proj"), weight("self_attn.v_proj"))),
        of("self_attn.k_proj"),
        L1,
    ),
    Mutation(
        "gate and up swapped",
        "llama",
        in_graph(exchange(weight("mlp.gate_proj"), weight("mlp.up_proj"))),
        of("mlp.gate_proj"),
        L1,
    ),
    Mutation(
        "one layer repeated",
        "llama",
        in_graph(repeated),
        f"{NODE1}/input_layernorm/RMSNormalization",
        L1,
    ),
    Mutation(
        "norms of a layer swapped",
        "llama",
        in_graph(exchange(weight(NORM), weight(POST))),
        f"{NODE1}/input_layernorm/RMSNormalization",
        L1,
    ),
    Mutation(
        "norm of another layer",
        "llama",
        in_graph(exchange(f"model.layers.0.{POST}.weight", weight(POST))),
        "/model/layers.0/post_attention_layernorm/RMSNormalization",
        "llama.layers.0",
    ),
    Mutation(
        "weight of the last norm left out",
        "llama",
        in_graph(change("model.norm.weight", np.ones_like)),
        "/model/norm/RMSNormalization",
    ),
    Mutation(
        "two columns of the head swapped",
        "llama",
        in_graph(change("lm_head.weight", columns_exchanged)),
        "/lm_head/MatMul",
    ),
    Mutation(
        "row of the embedding doubled, its token among the texts",
        "llama",
        embedding_row(is_read=True),
        "/model/embed_tokens/Gather",
    ),
    Mutation(
        "row of the embedding doubled, its token in no text",
        "llama",
        embedding_row(is_read=False),
        seen=False,
    ),
    Mutation(
        "rotation wrong at the last position",
        "llama",
        in_graph(rope_row(63)),
        "/model/layers.0/self_attn/RotaryEmbedding",
    ),
    Mutation(
        "rotation wrong at position 50, where no text is",
        "llama",
        in_graph(rope_row(50)),
        seen=False,
    ),
]
