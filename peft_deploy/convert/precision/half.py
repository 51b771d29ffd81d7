"""A graph in 16 bits: casts between the parts that compute so and those that keep float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from peft_deploy.convert.bind import IR_DTYPES
from peft_deploy.convert.precision.attention_masks import LOWEST, is_plain_mask
from peft_deploy.convert.precision.element_types import (
    LOGICAL,
    Kind,
    computed_in,
    constant_kind,
    pulled_into_float32,
    result_is_float,
)
from peft_deploy.signature import GraphSignature

_MASKED = {"Attention": 3}  # operator → its input that is added to the scores
_FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True)
class HalfPrecision:
    """What became of a graph.

    Args:
        dtype: that it computes in, numpy's name.
        casts: how many conversions were added.
        float32: operator → how many of them compute in float32.
    """

    dtype: str
    casts: int
    float32: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form, for the manifest."""
        return {"dtype": self.dtype, "casts": self.casts, "float32": self.float32}


class HalfPrecisionPass(ir.passes.InPlacePass):
    """Makes a graph that was traced in float32 compute in float16 or bfloat16.

    Precondition: weights are bound, in the type that they are stored in; slots have their type. Postcondition: every
    operator's floating-point operands are of one type; inputs and outputs are the signature's.

    Args:
        dtype: numpy's name of the type.
        signature: what the graph's inputs and outputs are to be.

    Attributes:
        done: what became of the graph, after the pass has run.
    """

    def __init__(self, dtype: str, signature: GraphSignature) -> None:
        super().__init__()
        self._dtype = dtype
        self._signature = signature
        self.done: HalfPrecision | None = None

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Adds the casts."""
        conversion = _Conversion(model.graph, IR_DTYPES[self._dtype])
        types = {spec.name: IR_DTYPES[spec.dtype] for spec in self._signature.inputs}
        conversion.begin(types)
        conversion.convert_nodes()
        conversion.finish({spec.name: IR_DTYPES[spec.dtype] for spec in self._signature.outputs})
        self.done = HalfPrecision(self._dtype, conversion.casts, conversion.float32)
        return ir.passes.PassResult(model, modified=True)


class _Conversion:
    """Goes through a graph once, in its order, and knows the type of every value so far."""

    def __init__(self, graph: ir.Graph, half: ir.DataType) -> None:
        self._graph = graph
        self._half = half
        self._first = graph[0]
        self._kinds: dict[ir.Value, Kind] = {}
        self._types: dict[ir.Value, ir.DataType] = {}
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._masks: dict[ir.Value, ir.Value] = {}
        self.float32: dict[str, int] = {}

    @property
    def casts(self) -> int:
        """How many were added."""
        return len(self._casts)

    def begin(self, types: dict[str, ir.DataType]) -> None:
        """Types of inputs and initializers, slots among them."""
        for value in self._graph.initializers.values():
            assert value.const_value is not None  # weights are bound
            self._note(value, value.const_value.dtype)
            if not value.is_graph_input():
                self._kinds[value] = constant_kind(value.const_value, self._half)
        for value in self._graph.inputs:
            if value.name in types:
                value.dtype = types[value.name]
            assert value.dtype is not None  # the signature's, or a slot's
            self._note(value, value.dtype)

    def convert_nodes(self) -> None:
        """All operators, each with operands of one type afterwards."""
        pulled = pulled_into_float32(self._graph)
        for node in list(self._graph):
            if node.op_type == "Cast" and not node.domain:
                self._note_cast(node)
            elif node.op_type in ("Constant", "ConstantOfShape"):
                self._note(node.outputs[0], _made_type(node))
            else:
                self._convert(node, node in pulled)

    def finish(self, types: dict[str, ir.DataType]) -> None:
        """Outputs of the signature's types, under its names."""
        for index, value in enumerate(self._graph.outputs):
            wanted = types[value.name or ""]
            if self._types[value] != wanted and wanted in (_FLOAT, self._half):
                name, shape = value.name, value.shape
                value.name, value.shape = f"{name}.computed", None
                result = self._cast(value, wanted)
                result.name, result.shape = name, shape
                self._graph.outputs[index] = result
            self._graph.outputs[index].dtype = wanted

    def _convert(self, node: ir.Node, pulled: bool) -> None:
        kinds = [Kind.OTHER if v is None else self._kinds[v] for v in node.inputs]
        kind = computed_in(node, kinds, pulled)
        if kind is Kind.HALF and not self._can_mask(node):
            kind = Kind.SINGLE
        wanted = self._type_of(kind, node, kinds)
        for index, value in enumerate(node.inputs):
            if value is not None and kinds[index] is not Kind.OTHER:
                if kind is Kind.HALF and _MASKED.get(node.op_type) == index:
                    value = self._clipped(value)
                node.replace_input_with(index, self._cast(value, wanted))
        if kind is Kind.SINGLE and node.op_type not in LOGICAL:
            self.float32[node.op_type] = self.float32.get(node.op_type, 0) + 1
        for index, value in enumerate(node.outputs):
            if kind is Kind.OTHER or not result_is_float(node, index):
                self._kinds[value], self._types[value] = Kind.OTHER, ir.DataType.UNDEFINED
            else:
                self._note(value, wanted)
                if kind is Kind.EITHER and not node.op_type.startswith("Gather"):
                    self._kinds[value] = Kind.EITHER

    def _type_of(self, kind: Kind, node: ir.Node, kinds: list[Kind]) -> ir.DataType:
        if kind is Kind.EITHER:  # moved as it is
            first = next(v for v, k in zip(node.inputs, kinds, strict=True) if k is not Kind.OTHER)
            assert first is not None  # its kind was found
            return self._types[first]
        return self._half if kind is Kind.HALF else _FLOAT

    def _can_mask(self, node: ir.Node) -> bool:
        """Whether 16 bits hold what an operator adds to its scores: positions would lose too many digits."""
        index = _MASKED.get(node.op_type)
        mask = node.inputs[index] if index is not None and len(node.inputs) > index else None
        return mask is None or self._kinds[mask] is Kind.OTHER or is_plain_mask(mask)

    def _clipped(self, mask: ir.Value) -> ir.Value:
        """A mask whose lowest numbers 16 bits can hold, and hold with a score added."""
        if self._types[mask] == self._half:
            return mask
        if mask not in self._masks:
            name = "attention_mask.lowest"
            if name not in self._graph.initializers:
                lowest = ir.val(
                    name, const_value=ir.tensor(np.array(LOWEST, np.float32), name=name)
                )
                self._graph.register_initializer(lowest)
            lowest = self._graph.initializers[name]
            clipped = self._insert("Max", [mask, lowest], mask, f"{mask.name}/clipped")
            self._note(clipped, _FLOAT)
            self._masks[mask] = clipped
        return self._masks[mask]

    def _note(self, value: ir.Value, dtype: ir.DataType) -> None:
        self._types[value] = dtype
        if dtype == self._half:
            self._kinds[value] = Kind.HALF
        else:
            self._kinds[value] = Kind.SINGLE if dtype == _FLOAT else Kind.OTHER
        value.dtype = dtype

    def _note_cast(self, node: ir.Node) -> None:
        value = node.inputs[0]
        assert value is not None
        target = ir.DataType(node.attributes["to"].as_int())
        self._note(node.outputs[0], target)
        if target == _FLOAT and _is_truth(value):  # 0 and 1, which every type holds
            self._kinds[node.outputs[0]] = Kind.EITHER

    def _cast(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        if self._types[value] == wanted:
            return value
        key = value, wanted
        if key not in self._casts:
            name = f"{value.name}/{wanted.name.lower()}"
            result = self._insert("Cast", [value], value, name, [ir.AttrInt64("to", int(wanted))])
            self._note(result, wanted)
            self._casts[key] = result
        return self._casts[key]

    def _insert(
        self,
        operator: str,
        inputs: list[ir.Value],
        after: ir.Value,
        name: str,
        attributes: list[ir.Attr] | None = None,
    ) -> ir.Value:
        """The result of a new operator, right behind what makes a value."""
        node = ir.Node(
            "", operator, inputs, attributes or (), num_outputs=1, name=f"{name}/{operator}"
        )
        node.outputs[0].name = f"{name}/{operator}_output_0"
        producer = after.producer()
        if producer is None:
            self._graph.insert_before(self._first, node)
        else:
            self._graph.insert_after(producer, node)
        return node.outputs[0]


def _made_type(node: ir.Node) -> ir.DataType:
    attribute = node.attributes.get("value")
    return _FLOAT if attribute is None else attribute.as_tensor().dtype


def _is_truth(value: ir.Value) -> bool:
    producer = value.producer()
    if producer is None:
        return value.dtype == ir.DataType.BOOL
    if producer.op_type == "Cast":
        return producer.attributes["to"].as_int() == int(ir.DataType.BOOL)
    if producer.op_type in ("Unsqueeze", "Reshape", "Expand", "Slice", "Transpose", "Squeeze"):
        return producer.inputs[0] is not None and _is_truth(producer.inputs[0])
    return producer.op_type in LOGICAL
