"""Weights as they were traced, for as long as shapes are inferred."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir

from peft_deploy.convert.bind import is_stored

_FLOAT = ir.DataType.FLOAT
_NARROW = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


@contextmanager
def weights_as_traced(graph: ir.Graph) -> Iterator[None]:
    """Lets weights of other precisions look like what the graph was traced in, without their contents.

    A graph gets its precision last. Until then inference would see float32 multiplied by float16, and give up; and
    initializers are written out, which those that the file holds as several tensors cannot be.
    """
    changed: list[tuple[ir.Value, ir.TensorProtocol]] = []
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is None or value.is_graph_input():
            continue
        if tensor.dtype not in _NARROW and is_stored(value) is None:
            continue
        changed.append((value, tensor))
        # Of a file that nobody reads: zeros would be written out, gigabytes of them for a large model.
        value.const_value = ir.ExternalTensor(
            "none", None, None, _FLOAT, shape=ir.Shape(tensor.shape.numpy()), name=str(value.name)
        )
        value.dtype = _FLOAT
    try:
        yield
    finally:
        for value, tensor in changed:
            value.const_value, value.dtype = tensor, tensor.dtype
