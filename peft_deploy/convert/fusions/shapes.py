"""The shapes of a graph's values, for as long as fusions look at them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from peft_deploy.convert.bind import is_stored

_FLOAT = ir.DataType.FLOAT
_NARROW = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


@contextmanager
def known_shapes(model: ir.Model) -> Iterator[None]:
    """Infers the shapes of all values, and forgets them again.

    What is added to a graph later, slots for a prefix say, changes sizes that these shapes name; and onnxruntime
    takes two values of the same symbolic shape to be of one size.
    """
    stated = {id(value) for value in _values(model.graph) if value.shape is not None}
    with _weights_as_traced(model.graph):
        common.ShapeInferencePass()(model)
    try:
        yield
    finally:
        for value in _values(model.graph):
            if id(value) not in stated and not value.is_graph_output():
                value.shape, value.type = None, None


@contextmanager
def _weights_as_traced(graph: ir.Graph) -> Iterator[None]:
    """Lets weights of other precisions look like what the graph was traced in, without their contents.

    A graph gets its precision last. Until then inference would see float32 multiplied by float16, and give up; and
    it writes small initializers out, which those that the file holds as several tensors cannot be.
    """
    changed: list[tuple[ir.Value, ir.TensorProtocol]] = []
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is None or value.is_graph_input():
            continue
        if tensor.dtype not in _NARROW and is_stored(value) is None:
            continue
        changed.append((value, tensor))
        zeros = partial(_zeros, tensor.shape.numpy())
        value.const_value = ir.LazyTensor(
            zeros, _FLOAT, shape=ir.Shape(tensor.shape.numpy()), name=value.name
        )
        value.dtype = _FLOAT
    try:
        yield
    finally:
        for value, tensor in changed:
            value.const_value, value.dtype = tensor, tensor.dtype


def _zeros(shape: Sequence[int]) -> ir.TensorProtocol:
    return ir.tensor(np.zeros(shape, np.float32))


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    for node in graph:
        yield from node.outputs
