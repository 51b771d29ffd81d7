"""Slots for several adapters at once: each row of a batch names the one that it uses.

    y = x · W + bias   becomes   y = (x · W + bias) + (x · A[ids]) · B[ids]

A is [adapters, in, R] and B is [adapters, R, out], with the adapters' scaling in it; ``ids`` is the input
``adapter_ids`` [batch]. By default there is one entry, of rank 0, which adds exactly zero: the one of rows without an
adapter, whose id is 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir

from peft_deploy.convert.linears import (
    NO_GROUPS,
    Groups,
    Linear,
    SameInput,
    Selection,
    by_input,
    choose_linears,
)
from peft_deploy.convert.lora_slots import LoraSlots
from peft_deploy.convert.nodes import new_node
from peft_deploy.convert.passes.node_names import module_folder
from peft_deploy.convert.slot_branches import (
    add_branch,
    add_ranks,
    add_slot,
    begin_branches,
    split_product,
)
from peft_deploy.convert.traced_weights import weights_as_traced
from peft_deploy.errors import ConversionError, listed
from peft_deploy.signature import ADAPTER_IDS, ADAPTERS, BANK_A, BANK_B, BATCH, LORA_RANKS
from peft_deploy.weights.source import DTYPES

_ROW_AXIS = "bank.row_axis"  # the name of the constant [1]
# Operators that onnx does not know, or from opset 23 on, 1.18: which outputs are of their first input's shape.
_SHAPED_AS_INPUT = {
    "Attention": (0,),
    "RMSNormalization": (0,),
    "RotaryEmbedding": (0,),
    "SkipLayerNormalization": (0, 3),
    "SkipSimplifiedLayerNormalization": (0, 3),
}
_SAMPLE_BATCH = 7919  # a prime that is no other size of a model


class AddAdapterBankPass(ir.passes.InPlacePass):
    """Adds the input ``adapter_ids``, and a ``MODULE.lora_A.bank`` and ``MODULE.lora_B.bank`` to chosen linear layers.

    Those of them that read the same input have one A, as in :class:`~peft_deploy.convert.lora_slots.AddLoraSlotsPass`.

    Precondition: weights are bound, and go by Hugging Face's names. Postcondition: but for ``adapter_ids`` [batch]
    the graph's inputs and outputs are what they were; with zeros there so is every result.

    Args:
        select: which linear layers get slots.
        groups: layers that read the same input, and are one packed linear layer in some graphs.

    Attributes:
        added: the slots, after the pass has run.

    Raises:
        ConversionError: the linear layers are of several element types, or the rows of the batch cannot be told
            apart in what one of them gets.
    """

    def __init__(self, select: Selection, groups: Groups = NO_GROUPS) -> None:
        super().__init__()
        self._groups = groups
        self._select = select
        self.added: LoraSlots | None = None

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Inserts five nodes a layer, fewer where layers share an A, and more where one gets one vector a row."""
        graph = model.graph
        chosen, dtype = choose_linears(graph, self._select, self._groups)
        dims = _input_ranks(model, chosen)
        ids = ir.val(ADAPTER_IDS, ir.DataType.INT64, ir.Shape([BATCH]))
        graph.inputs.append(ids)
        names: list[str] = []
        default = _Entry(DTYPES[dtype])
        for group in by_input(chosen, self._groups):
            A = add_slot(
                graph,
                group.name + BANK_A,
                (ADAPTERS, group.in_size, f"{group.name}.rank"),
                default,
            )
            names.append(group.name + BANK_A)
            vectors = dims[next(iter(group.linears))] == 2
            product = _project_down(graph, group, A, ids, vectors=vectors)
            parts = [product]
            if len(group.linears) > 1:
                names.append(group.name + LORA_RANKS)
                parts = split_product(graph, group, product, add_ranks(graph, group))
            for (module, linear), part in zip(group.linears.items(), parts, strict=True):
                shape = (ADAPTERS, f"{module}.rank", linear.shape[1])
                B = add_slot(graph, module + BANK_B, shape, default)
                names.append(module + BANK_B)
                folder = module_folder(module)
                branch = _multiplied(part, B, ids, f"{folder}/lora_B")
                if vectors:
                    branch.append(_along_rows(graph, "Squeeze", branch[-1].outputs[0], folder))
                add_branch(graph, linear, branch, folder)
        self.added = LoraSlots(tuple(chosen), tuple(names), None, dtype)
        return ir.passes.PassResult(model, modified=True)


class _Entry:
    """One adapter of rank 0."""

    def __init__(self, dtype: np.dtype[np.generic]) -> None:
        self._dtype = dtype

    def __call__(self, name: str, dims: tuple[int | str, ...]) -> ir.TensorProtocol:
        open_sizes = {ADAPTERS: 1}
        sizes = [dim if isinstance(dim, int) else open_sizes.get(dim, 0) for dim in dims]
        return ir.tensor(np.zeros(sizes, self._dtype), name=name)


def _project_down(
    graph: ir.Graph, group: SameInput, A: ir.Value, ids: ir.Value, *, vectors: bool
) -> ir.Value:
    """X · A[ids]; where x is one vector a row MatMul wants [batch, 1, in] beside [batch, in, R]."""
    folder, x = module_folder(group.name), group.input
    nodes = [_along_rows(graph, "Unsqueeze", x, folder)] if vectors else []
    nodes += _multiplied(nodes[0].outputs[0] if nodes else x, A, ids, f"{folder}/lora_A")
    begin_branches(graph, group, nodes)
    return nodes[-1].outputs[0]


def _multiplied(x: ir.Value, slot: ir.Value, ids: ir.Value, folder: str) -> list[ir.Node]:
    """The nodes of x · slot[ids]."""
    own = new_node("Gather", [slot, ids], folder)
    return [own, new_node("MatMul", [x, own.outputs[0]], folder)]


def _along_rows(graph: ir.Graph, operator: str, x: ir.Value, folder: str) -> ir.Node:
    """A node that adds the axis behind the batch, or takes it away."""
    return new_node(operator, [x, _row_axis(graph)], f"{folder}/lora")


def _row_axis(graph: ir.Graph) -> ir.Value:
    if _ROW_AXIS not in graph.initializers:
        tensor = ir.tensor(np.array([1], np.int64), name=_ROW_AXIS)
        graph.register_initializer(ir.val(_ROW_AXIS, const_value=tensor))
    return graph.initializers[_ROW_AXIS]


def _input_ranks(model: ir.Model, linears: Mapping[str, Linear]) -> dict[str, int]:
    """How many dimensions each layer's input has, of which the first must be the batch.

    Any other order would multiply rows by each other's adapters without an error.
    """
    found = _inferred_dims(model)
    ranks, wrong = {}, []
    for module, linear in linears.items():
        dims = found.get(linear.input.name or "")
        if dims is None or len(dims) not in (2, 3) or dims[0] != _SAMPLE_BATCH:
            shape = "of unknown shape" if dims is None else [_in_words(dim) for dim in dims]
            wrong.append(f"{module}: {shape}")
        else:
            ranks[module] = len(dims)
    if wrong:
        raise ConversionError(
            "the rows of a batch cannot be told apart in what these linear layers get, so that they cannot have a "
            f"bank of adapters:\n{listed(wrong)}",
            hint="use --adapters runtime, with one adapter for all rows",
        )
    return ranks


def _in_words(dim: int | str) -> int | str:
    return BATCH if dim == _SAMPLE_BATCH else dim


def _inferred_dims(model: ir.Model) -> dict[str, tuple[int | str, ...]]:
    """Dimensions of the graph's values as ONNX's own inference has them, for a sample batch.

    With a number it follows the batch further than with a name: past a broadcast against an unknown size. Operators
    that are newer than this onnx give something of their first input's shape.
    """
    with weights_as_traced(model.graph):
        proto = ir.to_proto(model)
    nodes = [stand_in for node in proto.graph.node for stand_in in _known(node)]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    del proto.graph.value_info[:]
    for value in proto.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == BATCH:
                dim.dim_value = _SAMPLE_BATCH
    graph = onnx.shape_inference.infer_shapes(proto).graph
    return {
        value.name: tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.value_info)
        if value.type.tensor_type.HasField("shape")
    }


def _known(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The node, or nodes that onnx knows the shapes of."""
    if node.op_type not in _SHAPED_AS_INPUT:
        return [node]
    shaped = [node.output[i] for i in _SHAPED_AS_INPUT[node.op_type] if i < len(node.output)]
    return [onnx.helper.make_node("Identity", node.input[:1], [name]) for name in shaped]
