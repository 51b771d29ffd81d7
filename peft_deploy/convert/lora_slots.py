"""Slots for LoRA: two inputs beside a linear layer, empty by default, which an adapter fills at run time.

    y = x · W + bias   becomes   y = (x · W + bias) + (x · A) · B

A is [in, R] and B is [R, out], with the adapter's scaling in it; both are graph inputs and initializers at once, what
ONNX calls inputs with a default. With the default of rank 0 the second term is exactly zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from peft_deploy.convert.passes.node_names import module_folder
from peft_deploy.convert.weight_file import WeightFile
from peft_deploy.errors import ConversionError
from peft_deploy.signature import LORA_A, LORA_B
from peft_deploy.weights.source import DTYPES

_WEIGHT, _BIAS = ".weight", ".bias"
_ZEROS = "slots.zeros"  # in the file of weights: what every slot of a fixed rank holds at first

# Packed linear layer → the layers in it, in the order of their columns.
Packed = Mapping[str, Sequence[str]]
NOT_PACKED: Packed = {}

# Given the module names of all linear layers of a graph, those that get slots.
Selection = Callable[[Sequence[str]], Sequence[str]]


@dataclass(frozen=True)
class LoraSlots:
    """The slots of a graph.

    Args:
        modules: of the layers that have them, by Hugging Face's names.
        names: A and B of each module, as the graph's inputs follow each other.
        rank: R of all slots; None where each takes any rank.
        dtype: numpy's name of their element type.
    """

    modules: tuple[str, ...]
    names: tuple[str, ...]
    rank: int | None
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form, for the manifest."""
        return {
            "targets": list(self.modules),
            "names": list(self.names),
            "rank": self.rank,
            "dtype": self.dtype,
        }


class AddLoraSlotsPass(ir.passes.InPlacePass):
    """Adds ``MODULE.lora_A.weight`` [in, rank] and ``MODULE.lora_B.weight`` [rank, out] to chosen linear layers.

    Precondition: weights are bound, and go by Hugging Face's names. Postcondition: the graph's other inputs and its
    outputs are what they were; without an adapter so is every result, bit by bit.

    Each layer's rank is a dimension of its own: onnxruntime reuses buffers of the same symbolic shape, and refuses
    to run where two layers call their ranks alike and an adapter gives them different ones.

    Args:
        select: which linear layers get slots.
        file: of the weights; gets the zeros of a fixed rank.
        rank: R for runtimes that take no empty tensors; None leaves it open.
        packed: packed linear layer → the layers in it; each of them gets slots of its own.

    Attributes:
        added: the slots, after the pass has run.

    Raises:
        ConversionError: the linear layers are of several element types.
    """

    def __init__(
        self,
        select: Selection,
        file: WeightFile,
        rank: int | None = None,
        packed: Packed = NOT_PACKED,
    ) -> None:
        super().__init__()
        self._packed = packed
        self._select = select
        self._file = file
        self._rank = rank
        self.added: LoraSlots | None = None

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Inserts three nodes a layer."""
        graph = model.graph
        chosen, dtype = choose_linears(graph, self._select, self._packed)
        default = self._defaults(chosen, dtype)
        names: list[str] = []
        for module, linear in chosen.items():
            in_size, out_size = linear.shape
            rank = self._rank or f"{module}.rank"
            A = add_slot(graph, module + LORA_A, (in_size, rank), default)
            B = add_slot(graph, module + LORA_B, (rank, out_size), default)
            folder = module_folder(module)
            xA = slot_node("MatMul", [linear.input, A], f"{folder}/lora_A")
            xAB = slot_node("MatMul", [xA.outputs[0], B], f"{folder}/lora_B")
            add_branch(graph, linear, [xA, xAB], folder)
            names += [module + LORA_A, module + LORA_B]
        self.added = LoraSlots(tuple(chosen), tuple(names), self._rank, dtype)
        return ir.passes.PassResult(model, modified=bool(chosen))

    def _defaults(self, chosen: Mapping[str, Linear], dtype: str) -> Default:
        """Empty tensors in the graph itself; or zeros, which all slots share and the file holds once."""
        if self._rank is None:
            return _EmptyDefault(DTYPES[dtype])
        largest = max((size for linear in chosen.values() for size in linear.shape), default=0)
        self._file.add(_ZEROS, np.zeros(largest * self._rank, DTYPES[dtype]))
        return _ZeroDefault(self._file, DTYPES[dtype])


@dataclass(frozen=True)
class Linear:
    """A linear layer of a graph.

    Args:
        input: is multiplied by the weight.
        result: of the layer, a bias included.
        shape: (in, out).
        dtype: numpy's name of the weight's element type.
    """

    input: ir.Value
    result: ir.Value
    shape: tuple[int, int]
    dtype: str


def find_linears(graph: ir.Graph, packed: Packed = NOT_PACKED) -> dict[str, Linear]:
    """The linear layers of a graph whose weights are bound, by module, in the order in which they are computed.

    A layer is a MatMul by a weight ``MODULE.weight`` [in, out] that nothing else uses, with ``MODULE.bias`` added to
    its result where there is one; or one of the results of a Split after such a layer that is packed.

    Args:
        graph: to look through.
        packed: packed layer → the layers in it.
    """
    found: dict[str, Linear] = {}
    for node in graph:
        if node.op_type != "MatMul" or node.domain:
            continue
        read, weight = node.inputs
        name = "" if weight is None else weight.name or ""
        if weight is None or not name.endswith(_WEIGHT) or len(weight.uses()) != 1:
            continue
        tensor = graph.initializers[name].const_value if name in graph.initializers else None
        if read is None or tensor is None or len(tensor.shape) != 2:
            continue
        module = name.removesuffix(_WEIGHT)
        in_size, out_size = tensor.shape.numpy()
        layer = Linear(
            read, _with_bias(node.outputs[0], module), (in_size, out_size), _numpy_name(tensor)
        )
        found.update(_parts(layer, packed[module]) if module in packed else [(module, layer)])
    return found


def _parts(layer: Linear, modules: Sequence[str]) -> Iterator[tuple[str, Linear]]:
    """The layers in a packed one."""
    users = list(layer.result.uses())
    split = users[0].node if len(users) == 1 else None
    if split is None or split.op_type != "Split" or len(split.outputs) != len(modules):
        return
    sizes = split.inputs[1].const_value if split.inputs[1] is not None else None
    assert sizes is not None  # written by PackLinearsPass
    for module, result, size in zip(modules, split.outputs, sizes.numpy(), strict=True):
        yield module, Linear(layer.input, result, (layer.shape[0], int(size)), layer.dtype)


def choose_linears(
    graph: ir.Graph, select: Selection, packed: Packed = NOT_PACKED
) -> tuple[dict[str, Linear], str]:
    """The linear layers that are to get slots, by module, and the element type that they share.

    Raises:
        ConversionError: they are of several element types.
    """
    linears = find_linears(graph, packed)
    chosen = {module: linears[module] for module in select(list(linears))}
    dtypes = {linear.dtype for linear in chosen.values()}
    if len(dtypes) > 1:
        raise ConversionError(
            f"the layers that are to get slots are of several element types: {', '.join(sorted(dtypes))}"
        )
    return chosen, dtypes.pop() if dtypes else "float32"


def in_numbered_layers(modules: Sequence[str]) -> list[str]:
    """The modules that belong to one of a model's layers, which are numbered; not the head, for instance."""
    return [module for module in modules if any(part.isdigit() for part in module.split("."))]


def _with_bias(product: ir.Value, module: str) -> ir.Value:
    users = list(product.uses())
    if len(users) != 1 or users[0].node.op_type != "Add" or product.is_graph_output():
        return product
    added = users[0].node
    names = {value.name for value in added.inputs if value is not None}
    return added.outputs[0] if f"{module}{_BIAS}" in names else product


def _numpy_name(tensor: ir.TensorProtocol) -> str:
    return str(tensor.dtype.numpy().name)


# Of a slot's name and dimensions, what it holds without an adapter.
Default = Callable[[str, tuple[int | str, ...]], ir.TensorProtocol]


@dataclass(frozen=True)
class _EmptyDefault:
    dtype: np.dtype[Any]

    def __call__(self, name: str, dims: tuple[int | str, ...]) -> ir.TensorProtocol:
        sizes = [dim if isinstance(dim, int) else 0 for dim in dims]
        return ir.tensor(np.zeros(sizes, self.dtype), name=name)


@dataclass(frozen=True)
class _ZeroDefault:
    file: WeightFile
    dtype: np.dtype[Any]

    def __call__(self, name: str, dims: tuple[int | str, ...]) -> ir.TensorProtocol:
        sizes = [int(dim) for dim in dims]
        return ir.ExternalTensor(
            self.file.path.name,
            self.file.placements[_ZEROS].offset,
            math.prod(sizes) * self.dtype.itemsize,
            ir.DataType.from_numpy(self.dtype),
            shape=ir.Shape(sizes),
            name=name,
            base_dir=self.file.path.parent,
        )


def add_slot(
    graph: ir.Graph, name: str, dims: tuple[int | str, ...], default: Default
) -> ir.Value:
    """A new input of the graph with a default, the last one so far."""
    tensor = default(name, dims)
    value = ir.Value(
        name=name, shape=ir.Shape(dims), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.inputs.append(value)
    graph.register_initializer(value)
    return value


def add_branch(graph: ir.Graph, linear: Linear, branch: Sequence[ir.Node], folder: str) -> None:
    """Adds what the last node of a branch gives to a layer's result, wherever that is used.

    Args:
        graph: with the layer.
        linear: the layer.
        branch: new nodes in order.
        folder: begins the name of the node that adds.
    """
    users = list(linear.result.uses())
    total = slot_node("Add", [linear.result, branch[-1].outputs[0]], f"{folder}/lora")
    producer = linear.result.producer()
    assert producer is not None  # a layer's result is computed
    graph.insert_after(producer, [*branch, total])
    for user in users:
        user.node.replace_input_with(user.idx, total.outputs[0])
    _take_over_output(graph, linear.result, total.outputs[0])


def _take_over_output(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """A layer whose result leaves the graph, such as the head: the name goes over to the sum."""
    for index, value in enumerate(graph.outputs):
        if value is old:
            name = old.name
            old.name, new.name = f"{name}.base", name
            new.shape, new.type = old.shape, old.type
            graph.outputs[index] = new


def slot_node(operator: str, inputs: Sequence[ir.Value | None], folder: str) -> ir.Node:
    """A new node ``FOLDER/OPERATOR`` with one result."""
    node = ir.Node("", operator, inputs, num_outputs=1, name=f"{folder}/{operator}")
    node.outputs[0].name = f"{node.name}_output_0"
    return node
