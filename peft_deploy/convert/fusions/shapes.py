"""The shapes of a graph's values, for as long as fusions look at them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
from onnx_ir.passes import common

from peft_deploy.convert.traced_weights import weights_as_traced


@contextmanager
def known_shapes(model: ir.Model) -> Iterator[None]:
    """Infers the shapes of all values, and forgets them again.

    What is added to a graph later, slots for a prefix say, changes sizes that these shapes name; and onnxruntime
    takes two values of the same symbolic shape to be of one size.
    """
    stated = {id(value) for value in _values(model.graph) if value.shape is not None}
    with weights_as_traced(model.graph):
        common.ShapeInferencePass()(model)
    try:
        yield
    finally:
        for value in _values(model.graph):
            if id(value) not in stated and not value.is_graph_output():
                value.shape, value.type = None, None


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    for node in graph:
        yield from node.outputs
