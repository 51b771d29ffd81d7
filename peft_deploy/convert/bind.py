"""Gives a weightless graph its weights: dangling names become named initializers that are read when written."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx_ir as ir

from peft_deploy.convert.graph import ConvertedGraph
from peft_deploy.errors import ConversionError, listed
from peft_deploy.weights import Array, TensorSource

IR_DTYPES = {
    "float64": ir.DataType.DOUBLE,
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}


def bind_weights(
    converted: ConvertedGraph, tensors: TensorSource, rename: Callable[[str], str]
) -> int:
    """Binds every dangling name to a tensor of the model, in place.

    The tensors are lazy: nothing is read before the model is written, and nothing is kept.

    Args:
        converted: the graph and the names of its weights.
        tensors: the weights, in PaddleNLP's names and layout.
        rename: PaddleNLP's parameter name → the initializer's name.

    Returns:
        How many weights were bound.

    Raises:
        ConversionError: a name is left dangling, or a weight is not in ``tensors``.
    """
    graph = converted.model.graph
    dangling = _dangling(graph)
    known = set(tensors.names())
    unknown = [
        n for n in dangling if n not in converted.parameters and n not in converted.constants
    ]
    missing = [p for n in dangling if (p := converted.parameters.get(n)) and p not in known]
    if unknown or missing:
        raise ConversionError(
            "the converted graph uses weights that are not there:\n" + listed([*unknown, *missing])
        )
    for name, value in dangling.items():
        if name in converted.constants:
            data = converted.constants[name]
            tensor, shape = _table(data), data.shape
            value.name = f"constant.{len(graph.initializers)}"
        else:
            parameter = converted.parameters[name]
            value.name = rename(parameter)
            tensor, shape = _lazy(tensors, parameter, value.name), tensors.info(parameter).shape
        value.const_value = tensor
        value.shape, value.dtype = ir.Shape(shape), tensor.dtype
        graph.register_initializer(value)
    return len(dangling)


def _dangling(graph: ir.Graph) -> dict[str, ir.Value]:
    """Values that nodes use and nothing makes, in order of first use, by name.

    onnx-ir makes one value for all uses of a dangling name.
    """
    inputs = {id(value) for value in graph.inputs}
    found: dict[str, ir.Value] = {}
    for node in graph:
        for value in node.inputs:
            if value is None or value.producer() is not None or id(value) in inputs:
                continue
            if value.name and value.name not in graph.initializers:
                first = found.setdefault(value.name, value)
                if first is not value:
                    raise ConversionError(f"the weight {value.name} appears as two values")
    return found


def _lazy(tensors: TensorSource, parameter: str, name: str) -> ir.TensorProtocol:
    info = tensors.info(parameter)
    return ir.LazyTensor(
        partial(_read, tensors, parameter),
        dtype=IR_DTYPES[info.dtype],
        shape=ir.Shape(info.shape),
        name=name,
    )


def _read(tensors: TensorSource, parameter: str) -> ir.TensorProtocol:
    data: Array = np.ascontiguousarray(tensors.read(parameter))
    return ir.Tensor(data, dtype=IR_DTYPES[tensors.info(parameter).dtype], name=parameter)


def _table(data: Array) -> ir.TensorProtocol:
    return ir.Tensor(np.ascontiguousarray(data))
