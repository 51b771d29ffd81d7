"""The linear layers of a graph, and which of them read the same input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from peft_deploy.errors import ConversionError
from peft_deploy.signature import joint_module

_WEIGHT, _BIAS = ".weight", ".bias"

# Packed linear layer → the layers in it, in the order of their columns; whether or not a graph has them packed.
Groups = Mapping[str, Sequence[str]]
NO_GROUPS: Groups = {}

# Given the module names of all linear layers of a graph, those that get slots.
Selection = Callable[[Sequence[str]], Sequence[str]]


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


def _with_bias(product: ir.Value, module: str) -> ir.Value:
    users = list(product.uses())
    if len(users) != 1 or users[0].node.op_type != "Add" or product.is_graph_output():
        return product
    added = users[0].node
    names = {value.name for value in added.inputs if value is not None}
    return added.outputs[0] if f"{module}{_BIAS}" in names else product


def _numpy_name(tensor: ir.TensorProtocol) -> str:
    return str(tensor.dtype.numpy().name)
