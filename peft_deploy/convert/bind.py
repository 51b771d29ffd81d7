"""Joins a graph without weights and a file of weights."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from peft_deploy.convert.graph import ConvertedGraph
from peft_deploy.convert.weight_file import Placement, WeightFile
from peft_deploy.errors import ConversionError, listed
from peft_deploy.weights import StoredTensor

IR_DTYPES = {
    "float64": ir.DataType.DOUBLE,
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "int64": ir.DataType.INT64,
    "int32": ir.DataType.INT32,
    "int16": ir.DataType.INT16,
    "int8": ir.DataType.INT8,
    "uint8": ir.DataType.UINT8,
    "bool": ir.DataType.BOOL,
}


_STORED = "peft_deploy.stored"


def bind_weights(
    converted: ConvertedGraph, file: WeightFile, rename: Callable[[str], str]
) -> None:
    """Makes every dangling name an initializer that lies in the file, in place.

    A weight that the file holds as several tensors becomes an initializer without contents, which the step that
    knows how it is stored has to replace (:func:`is_stored`).

    Args:
        converted: the graph, cleaned up.
        file: all of the model's weights under PaddleNLP's names, and the stand-in's tables under the graph's.
        rename: PaddleNLP's parameter name → the initializer's name.

    Raises:
        ConversionError: the graph uses a weight that is not in the file, or leaves one unused.
    """
    graph = converted.model.graph
    dangling = _dangling(graph)
    sources = {name: converted.parameters.get(name, name) for name in dangling}
    parts = {part for stored in file.stored.values() for part in stored.parts.values()}
    present = file.placements.keys() - parts | file.stored.keys()
    missing = set(sources.values()) - present
    unused = present - set(sources.values()) - converted.constants.keys()
    if missing or unused:
        raise ConversionError(
            "the converted graph does not use the model's weights one to one"
            + (f"; not there:\n{listed(missing)}" if missing else "")
            + (f"; not used:\n{listed(unused)}" if unused else "")
        )
    tables = 0
    for name, value in dangling.items():
        if name in converted.parameters:
            value.name = rename(sources[name])
        else:
            value.name, tables = f"table.{tables}", tables + 1
        stored = file.stored.get(sources[name])
        if stored is None:
            place(value, file.placements[sources[name]], file)
        else:
            _stand_for(value, stored)
        graph.register_initializer(value)


def is_stored(value: ir.Value) -> StoredTensor | None:
    """What an initializer stands for that the file holds as several tensors; None for any other value."""
    found = value.meta.get(_STORED)
    return found if isinstance(found, StoredTensor) else None


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


def _stand_for(value: ir.Value, stored: StoredTensor) -> None:
    def contents() -> ir.TensorProtocol:
        raise ConversionError(
            f"{value.name} is stored as {stored.storage.name}, and nothing in the graph reads it so"
        )

    dtype, shape = IR_DTYPES["float32"], ir.Shape(stored.info.shape)
    value.const_value = ir.LazyTensor(contents, dtype, shape=shape, name=value.name)
    value.shape, value.dtype = shape, dtype
    value.meta[_STORED] = stored


def place(value: ir.Value, placement: Placement, file: WeightFile) -> None:
    """Makes a value's contents those bytes of the file."""
    tensor = ir.ExternalTensor(
        file.path.name,
        placement.offset,
        placement.length,
        IR_DTYPES[placement.dtype],
        shape=ir.Shape(placement.shape),
        name=value.name or "",
        base_dir=file.path.parent,
    )
    value.const_value = tensor
    value.shape, value.dtype = ir.Shape(placement.shape), tensor.dtype
