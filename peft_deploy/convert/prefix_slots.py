"""Slots for a prefix: inputs with an empty default, which an adapter file fills at run time.

What the graph then computes is by construction what it computes when the same prefix comes as ``past_key_values``:
inside, the prefix stands before the cache, its columns before the mask, and its offset is added to the positions.
From outside nothing has changed: the mask does not count the prefix, and the grown cache leaves it out, as runtimes
that allocate that cache themselves (onnxruntime-genai) need.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from peft_deploy.convert.bind import IR_DTYPES
from peft_deploy.errors import ConversionError
from peft_deploy.signature import (
    ATTENTION_MASK,
    INPUT_IDS,
    POSITION_IDS,
    PREFIX,
    PREFIX_OFFSET,
    GraphSignature,
    TensorSpec,
    prefix_names,
    present_names,
)
from peft_deploy.weights.source import DTYPES

_SEQUENCE_AXIS = 2
_END = np.iinfo(np.int64).max


class AddPrefixSlotsPass(ir.passes.InPlacePass):
    """Adds ``prefix.{i}.key|value`` [1, K, prefix, D] and, where there are position_ids, ``prefix.position_offset``.

    Precondition: inputs and outputs are the signature's. Postcondition: they still are, but for the slots, which are
    graph inputs and initializers at once; without an adapter every result is what it was, bit by bit.

    Args:
        signature: of the graph.

    Raises:
        ConversionError: the graph has no cache or no mask.
    """

    def __init__(self, signature: GraphSignature) -> None:
        super().__init__()
        if not signature.past or ATTENTION_MASK not in signature.input_names:
            raise ConversionError("a graph without a cache and a mask cannot have prefix slots")
        self._signature = signature

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Inserts the nodes."""
        editor = _Editor(model.graph)
        slots = {spec.name: editor.slot(spec) for spec in slot_specs(self._signature)}
        past = [spec.name for spec in self._signature.past]
        prefixes = prefix_names(self._signature.num_layers)
        presents = present_names(self._signature.num_layers)
        batch = editor.size_of(editor.inputs[INPUT_IDS], 0, "batch")
        length = editor.size_of(slots[prefixes[0]], _SEQUENCE_AXIS, "length")
        editor.widen_mask(editor.inputs[ATTENTION_MASK], batch, length)
        if POSITION_IDS in editor.inputs:
            editor.move_positions(editor.inputs[POSITION_IDS], slots[PREFIX_OFFSET])
        rows = editor.node("Concat", [batch, editor.constant([1, 1, 1])], "rows", {"axis": 0})
        for name, slot in zip(past, prefixes, strict=True):
            editor.prepend(editor.inputs[name], slots[slot], rows)
        for name in presents:
            editor.leave_out(name, length)
        return ir.passes.PassResult(model, modified=True)


def slot_specs(signature: GraphSignature) -> list[TensorSpec]:
    """The slots of a graph in order; the length of a prefix is symbolic."""
    names = prefix_names(signature.num_layers)
    specs = [
        TensorSpec(name, past.dtype, (1, past.dims[1], PREFIX, past.dims[3]))
        for name, past in zip(names, signature.past, strict=True)
    ]
    if POSITION_IDS in signature.input_names:
        specs.append(TensorSpec(PREFIX_OFFSET, "int64", (1,)))
    return specs


class _Editor:
    """Inserts named nodes: before all others, but for those that cut the outputs."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._first = graph[0]
        self._constants: dict[tuple[int, ...], ir.Value] = {}
        self.inputs = {value.name or "": value for value in graph.inputs}

    def slot(self, spec: TensorSpec) -> ir.Value:
        """A graph input with a default: no tokens, an offset of 0."""
        sizes = [0 if isinstance(dim, str) else dim for dim in spec.dims]
        default = np.zeros(sizes, DTYPES[spec.dtype])
        dtype = IR_DTYPES.get(spec.dtype, ir.DataType.INT64)
        value = ir.Value(name=spec.name, shape=ir.Shape(spec.dims), type=ir.TensorType(dtype))
        value.const_value = ir.tensor(default, dtype=dtype, name=spec.name)
        self._graph.inputs.append(value)
        self._graph.register_initializer(value)
        return value

    def constant(self, numbers: list[int]) -> ir.Value:
        """An initializer of these numbers, the same one for the same numbers."""
        key = tuple(numbers)
        if key not in self._constants:
            name = f"prefix.constant.{len(self._constants)}"
            tensor = ir.tensor(np.array(numbers, np.int64), name=name)
            value = ir.val(name, const_value=tensor)
            self._graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]

    def node(
        self,
        operator: str,
        inputs: list[ir.Value],
        name: str,
        attributes: dict[str, int] | None = None,
        *,
        last: bool = False,
    ) -> ir.Value:
        """The result of a new node ``/prefix/NAME/OPERATOR``."""
        path = f"/prefix/{name}/{operator}"
        given = [ir.AttrInt64(key, number) for key, number in (attributes or {}).items()]
        node = ir.Node("", operator, inputs, given, num_outputs=1, name=path)
        node.outputs[0].name = f"{path}_output_0"
        if last:
            self._graph.append(node)
        else:
            self._graph.insert_before(self._first, node)
        return node.outputs[0]

    def size_of(self, value: ir.Value, axis: int, name: str) -> ir.Value:
        """One dimension, [1]."""
        shape = self.node("Shape", [value], name)
        return self.node("Gather", [shape, self.constant([axis])], name, {"axis": 0})

    def widen_mask(self, mask: ir.Value, batch: ir.Value, length: ir.Value) -> None:
        """Everybody attends to the prefix: [B, T] becomes [B, P + T]."""
        users = list(mask.uses())
        shape = self.node("Concat", [batch, length], "mask/shape", {"axis": 0})
        ones = self.node("Expand", [self.constant([1]), shape], "mask")
        self._rewire(users, self.node("Concat", [ones, mask], "mask", {"axis": 1}))

    def move_positions(self, positions: ir.Value, offset: ir.Value) -> None:
        """Adds the offset to position_ids [B, S]."""
        users = list(positions.uses())
        self._rewire(users, self.node("Add", [positions, offset], "positions"))

    def prepend(self, past: ir.Value, slot: ir.Value, rows: ir.Value) -> None:
        """Puts the prefix before one tensor of the cache: [B, K, T, D] becomes [B, K, P + T, D]."""
        users = list(past.uses())
        own = self.node("Expand", [slot, rows], past.name or "")
        axis = {"axis": _SEQUENCE_AXIS}
        self._rewire(users, self.node("Concat", [own, past], past.name or "", axis))

    def leave_out(self, output: str, length: ir.Value) -> None:
        """Cuts the prefix from a tensor of the grown cache."""
        index = [value.name for value in self._graph.outputs].index(output)
        whole = self._graph.outputs[index]
        if whole.producer() is None:
            raise ConversionError(f"the graph computes no {output}")
        cut = self.node(
            "Slice",
            [whole, length, self.constant([_END]), self.constant([_SEQUENCE_AXIS])],
            output,
            last=True,
        )
        cut.shape, cut.type = whole.shape, whole.type
        whole.name, cut.name = f"/prefix/{output}/whole", output
        whole.shape = None
        self._graph.outputs[index] = cut

    @staticmethod
    def _rewire(users: list[Any], value: ir.Value) -> None:
        for node, index in users:
            node.replace_input_with(index, value)
