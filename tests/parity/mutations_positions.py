"""Faults of rotary positions in a graph as an export writes it by default."""

from __future__ import annotations

import numpy as np
from bundle_edits import GraphEdit, attribute, change
from mutations_decoder import L1, QUERY_LENGTH, TOTAL_LENGTH, exchanged_inputs, llama

THETA, MAX_POSITIONS, HEAD_DIM = 10000.0, 64, 10
TABLE, SINES, POSITIONS = 1, 2, 3  # inputs of RotaryEmbedding
INT64 = 7  # TensorProto.DataType


def rotations(layers: tuple[int, ...] = (0, 1)) -> list[str]:
    """The operators that rotate q and k."""
    return [
        f"/model/layers.{i}/self_attn/RotaryEmbedding{end}" for i in layers for end in ("", "_1")
    ]


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


def own_positions(graph: GraphEdit) -> None:
    """Positions are counted from the past's length, whatever position_ids says."""
    value = graph.node("/model/Unsqueeze").input[0]  # [S], counted from P
    for name in rotations():
        zeros = graph.add(name, "Sub", "position_ids", "position_ids")
        graph.node(name).input[POSITIONS] = graph.add(name, "Add", zeros, value)


def late_positions(graph: GraphEdit) -> None:
    """Positions are one too low where one token follows a past."""
    first = rotations()[0]
    one = graph.constant(np.array(1))
    single = graph.add(first, "Equal", QUERY_LENGTH, one)
    longer = graph.add(first, "Greater", TOTAL_LENGTH, QUERY_LENGTH)
    decoding = graph.add(first, "And", single, longer)
    shift = graph.add(first, "Cast", decoding, to=INT64)
    moved = graph.add(first, "Sub", "position_ids", shift, name="/model/positions/Sub")
    for name in rotations():
        graph.node(name).input[POSITIONS] = moved


def interleaved_rotary(graph: GraphEdit) -> None:
    """Neighbours are rotated with each other in place of the two halves."""
    for name in rotations((1,)):
        attribute(name, "interleaved", 1)(graph)


def backward_rotary(graph: GraphEdit) -> None:
    """q and k are rotated the other way round: their products depend on the positions as before."""
    for name in rotations((1,)):
        graph.on_input(name, SINES, "Neg")


POSITION_MUTATIONS = [
    llama("rope theta off by 1 %", other_theta, node=rotations()[1]),
    llama(
        "positions off by one", change("table.0", lambda t: np.roll(t, 1, 0)), node=rotations()[1]
    ),
    llama("positions off by one only in decoding", late_positions, node="/model/positions/Sub"),
    llama("position_ids ignored", own_positions, node=rotations()[1], cancels=True),
    llama(
        "rotary pairs interleaved in place of halves",
        interleaved_rotary,
        node=rotations()[3],
        layer=L1,
    ),
    llama("rotation backwards", backward_rotary, node=rotations()[3], layer=L1),
    llama(
        "cosines and sines swapped in one rotation",
        exchanged_inputs(rotations()[2], TABLE, SINES),
        node=rotations()[2],
        layer=L1,
    ),
]
