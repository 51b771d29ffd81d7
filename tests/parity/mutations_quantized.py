"""Faults of weights in blocks of small whole numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from bundle_edits import Array, GraphEdit, change
from mutation_subjects import Subject
from mutations import Break, Mutation, in_graph, with_subject

from peft_deploy.weights import BlockQuantized

LAYER, FOLDER = "llama.layers.1", "/model/layers.1"
DOWN, OUT = "mlp.down_proj", "self_attn.o_proj"
NUMBERS, SCALES = "quantized", "scales"
ZERO_POINTS = 3  # input of MatMulNBits; two of them in a byte


def part(module: str, kind: str) -> str:
    return f"model.layers.1.{module}.weight.{kind}"


def operator(module: str) -> str:
    return f"{FOLDER}/{module.replace('.', '/')}/MatMulNBits"


def one(name: str, module: str, kind: str, apply: Break) -> Mutation:
    """A fault of one weight of the second layer."""
    return Mutation(name, "llama, int4", apply, operator(module), LAYER, file=part(module, kind))


def changed(name: str, module: str, kind: str, value: Callable[[Array], Array]) -> Mutation:
    """One of its two tensors is another."""
    return one(name, module, kind, in_graph(change(part(module, kind), value)))


def shifted(numbers: Array) -> Array:
    return np.roll(numbers.reshape(-1, numbers.shape[-1]), 1, 0).reshape(numbers.shape)


def exchanged(scales: Array) -> Array:
    """Of the first two blocks of one column."""
    scales[7, [0, 1]] = scales[7, [1, 0]]
    return scales


def halves_exchanged(numbers: Array) -> Array:
    return numbers % 16 * 16 + numbers // 16


def one_step(numbers: Array) -> Array:
    """Of the lower number of one byte."""
    byte = numbers[5, 1, 3]
    numbers[5, 1, 3] = byte + 1 if byte % 16 < 15 else byte - 1
    return numbers


def zero_points_of_seven(graph: GraphEdit) -> None:
    rows, blocks = graph.weight(part(DOWN, SCALES)).shape
    points = np.full((rows, -(-blocks // 2)), 0x77, np.uint8)
    node = graph.node(operator(DOWN))
    assert len(node.input) == ZERO_POINTS
    node.input.append(graph.constant(points))


def adapter_left_out(subject: Subject, graph: GraphEdit) -> None:
    base = subject.base[f"model.layers.1.{OUT}.weight"]
    for suffix, value in BlockQuantized(4).encode(base, OUT).items():
        graph.set_weight(part(OUT, suffix.removeprefix(".")), value)


QUANTIZED_MUTATIONS = [
    changed("blocks of a weight shifted by one", DOWN, NUMBERS, shifted),
    changed("scales of two blocks swapped", DOWN, SCALES, exchanged),
    changed("one number of a block one step off", DOWN, NUMBERS, one_step),
    changed("the two numbers of every byte swapped", OUT, NUMBERS, halves_exchanged),
    changed("scales of a weight in half precision", OUT, SCALES, lambda s: s.astype(np.float16)),
    one("adapter left out of a quantized weight", OUT, NUMBERS, with_subject(adapter_left_out)),
    Mutation(
        "zero point off by one",
        "llama, int4",
        in_graph(zero_points_of_seven),
        operator(DOWN),
        LAYER,
    ),
    Mutation(
        "scales of a quantized head shifted by one column",
        "llama, int4",
        in_graph(change("lm_head.weight.scales", lambda s: np.roll(s, 1, 0))),
        "/lm_head/MatMulNBits",
        file="lm_head.weight.scales",
    ),
]
