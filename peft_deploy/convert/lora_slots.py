"""Slots for LoRA: inputs beside a linear layer, empty by default, which an adapter fills at run time.

    y = x · W + bias   becomes   y = (x · W + bias) + (x · A) · B

A is [in, R] and B is [R, out], with the adapter's scaling in it; both are graph inputs and initializers at once, what
ONNX calls inputs with a default. With the default of rank 0 the second term is exactly zero. Layers that read the same
input, such as q, k and v, share one A with the columns of all of them, which their input is multiplied by in one go.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from peft_deploy.convert.pack_linears import split_sizes
from peft_deploy.convert.passes.node_names import module_folder
from peft_deploy.convert.weight_file import WeightFile
from peft_deploy.errors import ConversionError
from peft_deploy.signature import LORA_A, LORA_B, LORA_RANKS, joint_module
from peft_deploy.weights.source import DTYPES

_WEIGHT, _BIAS = ".weight", ".bias"
_ZEROS = "slots.zeros"  # in the file of weights: what every slot of a fixed rank holds at first

# Packed linear layer → the layers in it, in the order of their columns; whether or not a graph has them packed.
Groups = Mapping[str, Sequence[str]]
NO_GROUPS: Groups = {}

# Given the module names of all linear layers of a graph, those that get slots.
Selection = Callable[[Sequence[str]], Sequence[str]]


@dataclass(frozen=True)
class LoraSlots:
    """The slots of a graph.

    Args:
        modules: of the layers that have them, by Hugging Face's names.
        names: of the graph's inputs, as they follow each other.
        rank: R of all layers; None where each takes any rank.
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

    Those of them that read the same input have one A [in, sum of their ranks], called after all of them, and
    ``….lora_A.ranks`` [layers], int64, which says how many of its columns are whose. With a fixed rank there is none.

    Precondition: weights are bound, and go by Hugging Face's names. Postcondition: the graph's other inputs and its
    outputs are what they were; without an adapter so is every result, bit by bit.

    Each layer's rank is a dimension of its own: onnxruntime reuses buffers of the same symbolic shape, and refuses
    to run where two layers call their ranks alike and an adapter gives them different ones.

    Args:
        select: which linear layers get slots.
        file: of the weights; gets the zeros of a fixed rank.
        rank: R for runtimes that take no empty tensors; None leaves it open.
        groups: layers that read the same input, and are one packed linear layer in some graphs.

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
        groups: Groups = NO_GROUPS,
    ) -> None:
        super().__init__()
        self._groups = groups
        self._select = select
        self._file = file
        self._rank = rank
        self.added: LoraSlots | None = None

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Inserts three nodes a layer, or two and for layers that share an A two more."""
        graph = model.graph
        chosen, dtype = choose_linears(graph, self._select, self._groups)
        shared = by_input(chosen, self._groups)
        default = self._defaults(shared, dtype)
        names: list[str] = []
        for group in shared:
            rank = self._rank
            width = f"{group.name}.rank" if rank is None else rank * len(group.linears)
            A = add_slot(graph, group.name + LORA_A, (group.in_size, width), default)
            names.append(group.name + LORA_A)
            product = slot_node("MatMul", [group.input, A], f"{module_folder(group.name)}/lora_A")
            begin_branches(graph, group, [product])
            parts = [product.outputs[0]]
            if len(group.linears) > 1:
                if rank is None:
                    sizes = add_ranks(graph, group)
                    names.append(group.name + LORA_RANKS)
                else:
                    sizes = split_sizes(graph, [rank] * len(group.linears))
                parts = split_product(graph, group, product.outputs[0], sizes)
            for (module, linear), part in zip(group.linears.items(), parts, strict=True):
                dims = (f"{module}.rank" if rank is None else rank, linear.shape[1])
                B = add_slot(graph, module + LORA_B, dims, default)
                names.append(module + LORA_B)
                folder = module_folder(module)
                add_branch(
                    graph, linear, [slot_node("MatMul", [part, B], f"{folder}/lora_B")], folder
                )
        self.added = LoraSlots(tuple(chosen), tuple(names), self._rank, dtype)
        return ir.passes.PassResult(model, modified=bool(chosen))

    def _defaults(self, shared: Sequence[SameInput], dtype: str) -> Default:
        """Empty tensors in the graph itself; or zeros, which all slots share and the file holds once."""
        if self._rank is None:
            return _EmptyDefault(DTYPES[dtype])
        widths = [group.in_size * len(group.linears) for group in shared]
        widths += [linear.shape[1] for group in shared for linear in group.linears.values()]
        self._file.add(_ZEROS, np.zeros(max(widths, default=0) * self._rank, DTYPES[dtype]))
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


def find_linears(graph: ir.Graph, groups: Groups = NO_GROUPS) -> dict[str, Linear]:
    """The linear layers of a graph whose weights are bound, by module, in the order in which they are computed.

    A layer is a MatMul by a weight ``MODULE.weight`` [in, out] that nothing else uses, with ``MODULE.bias`` added to
    its result where there is one; or one of the results of a Split after such a layer that is packed.

    Args:
        graph: to look through.
        groups: packed layer → the layers in it.
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
        found.update(_parts(layer, groups[module]) if module in groups else [(module, layer)])
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
    graph: ir.Graph, select: Selection, groups: Groups = NO_GROUPS
) -> tuple[dict[str, Linear], str]:
    """The linear layers that are to get slots, by module in the order in which they are computed, and their type.

    Raises:
        ConversionError: they are of several element types.
    """
    linears = find_linears(graph, groups)
    wanted = set(select(list(linears)))
    chosen = {module: linear for module, linear in linears.items() if module in wanted}
    dtypes = {linear.dtype for linear in chosen.values()}
    if len(dtypes) > 1:
        raise ConversionError(
            f"the layers that are to get slots are of several element types: {', '.join(sorted(dtypes))}"
        )
    return chosen, dtypes.pop() if dtypes else "float32"


@dataclass(frozen=True)
class SameInput:
    """Linear layers that read the same input, or one alone; they share an A.

    Args:
        linears: by module, in the order of A's columns.
    """

    linears: Mapping[str, Linear]

    @property
    def name(self) -> str:
        """What they are called together."""
        return joint_module(list(self.linears))

    @property
    def input(self) -> ir.Value:
        """What they read."""
        return self._first.input

    @property
    def in_size(self) -> int:
        """Its width."""
        return self._first.shape[0]

    @property
    def result(self) -> ir.Value:
        """Of the one that is computed first."""
        return self._first.result

    @property
    def _first(self) -> Linear:
        return next(iter(self.linears.values()))


def by_input(chosen: Mapping[str, Linear], groups: Groups) -> list[SameInput]:
    """Layers that get slots, those together that one group names and that read the same value.

    Args:
        chosen: in the order in which they are computed.
        groups: packed layer → the layers in it.
    """
    packed = {part: module for module, parts in groups.items() for part in parts}
    found: dict[Any, dict[str, Linear]] = {}
    for module, linear in chosen.items():
        parent = module.rpartition(".")[0]
        key = (packed[module], parent, id(linear.input)) if module in packed else module
        found.setdefault(key, {})[module] = linear
    return [SameInput(linears) for linears in found.values()]


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


def add_ranks(graph: ir.Graph, group: SameInput) -> ir.Value:
    """The slot that says how many columns of a joint A belong to which layer; none by default."""
    dims = (len(group.linears),)
    return add_slot(graph, group.name + LORA_RANKS, dims, _EmptyDefault(np.dtype(np.int64)))


def split_product(
    graph: ir.Graph, group: SameInput, product: ir.Value, sizes: ir.Value
) -> list[ir.Value]:
    """Each layer's part of what a joint A gives.

    Args:
        graph: with the layers.
        group: the layers.
        product: x · A.
        sizes: how many columns are whose.
    """
    folder = f"{module_folder(group.name)}/lora_A"
    split = ir.Node(
        "",
        "Split",
        [product, sizes],
        [ir.AttrInt64("axis", -1)],
        num_outputs=len(group.linears),
        name=f"{folder}/Split",
    )
    for i, value in enumerate(split.outputs):
        value.name = f"{split.name}_output_{i}"
    begin_branches(graph, group, [split])
    return list(split.outputs)


def begin_branches(graph: ir.Graph, group: SameInput, nodes: Sequence[ir.Node]) -> None:
    """Inserts what all branches of some layers begin with, in front of the first of them."""
    producer = group.result.producer()
    assert producer is not None  # a layer's result is computed
    graph.insert_before(producer, nodes)


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
