"""Linear layers of one input, multiplied in one go.

    q = x · Wq + bq, k = x · Wk + bk, …   becomes   q, k, … = split(x · [Wq Wk …] + [bq bk …])

Every number is computed from the same factors as before; a runtime may add them up in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from peft_deploy.convert.graph import ConvertedGraph
from peft_deploy.convert.nodes import new_node, new_split, split_sizes
from peft_deploy.errors import ConversionError
from peft_deploy.families import PackedLinear
from peft_deploy.families.packing import BIAS, WEIGHT


class PackLinearsPass(ir.passes.InPlacePass):
    """Replaces the layers of each group by one MatMul, one Add where they have biases, and one Split.

    Precondition: the graph is cleaned up, and its weights are dangling. Postcondition: the packed weights dangle in
    their place, ``parameters`` knows them; the parts' results keep their names, so that each can still be told.

    Args:
        groups: to pack; all of their weights are in the graph.
        converted: has the graph.

    Raises:
        ConversionError: layers of a group do not read the same input, or are no plain linear layers.
    """

    def __init__(self, groups: Sequence[PackedLinear], converted: ConvertedGraph) -> None:
        super().__init__()
        self._groups = groups
        self._parameters = converted.parameters
        self._shapes = converted.shapes

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Packs every group."""
        uses = self._uses(model.graph)
        order = {id(node): i for i, node in enumerate(model.graph)}
        for group in self._groups:
            layers = [_layer(part, uses, biased=group.biased) for part in group.parts]
            _require_one_input(group, layers)
            layers_in_order = sorted(layers, key=lambda layer: order[id(layer.product)])
            self._pack(model.graph, group, layers, layers_in_order[0].product)
        return ir.passes.PassResult(model, modified=bool(self._groups))

    def _uses(self, graph: ir.Graph) -> dict[str, list[tuple[ir.Node, int]]]:
        """Parameter → the nodes that use it, and as which input."""
        found: dict[str, list[tuple[ir.Node, int]]] = {}
        for node in graph:
            for i, value in enumerate(node.inputs):
                if value is not None and value.producer() is None and value.name:
                    parameter = self._parameters.get(value.name, value.name)
                    found.setdefault(parameter, []).append((node, i))
        return found

    def _pack(
        self, graph: ir.Graph, group: PackedLinear, layers: Sequence[_Layer], first: ir.Node
    ) -> None:
        folder = f"{str(first.name).rsplit('/', 2)[0]}/{group.module.rpartition('.')[2]}"
        nodes = [new_node("MatMul", [first.inputs[0], self._weight(group, WEIGHT)], folder)]
        if group.biased:
            nodes.append(new_node("Add", [nodes[0].outputs[0], self._weight(group, BIAS)], folder))
        sizes = [self._shapes[part + WEIGHT][-1] for part in group.parts]
        packed = nodes[-1].outputs[0]
        split = new_split(packed, split_sizes(graph, sizes), len(sizes), folder)
        graph.insert_before(first, [*nodes, split])
        for layer, part in zip(layers, split.outputs, strict=True):
            part.name, part.shape, part.type = (
                layer.result.name,
                layer.result.shape,
                layer.result.type,
            )
            layer.result.replace_all_uses_with(part)
            graph.remove(layer.nodes, safe=True)

    def _weight(self, group: PackedLinear, kind: str) -> ir.Value:
        name = group.module + kind
        self._parameters[name] = name
        return ir.Value(name=name)


@dataclass(frozen=True)
class _Layer:
    """A linear layer of the graph.

    Args:
        module: its path.
        product: multiplies by the weight.
        added: adds the bias, where there is one.
    """

    module: str
    product: ir.Node
    added: ir.Node | None

    @property
    def nodes(self) -> list[ir.Node]:
        """Its nodes."""
        return [self.product] if self.added is None else [self.product, self.added]

    @property
    def result(self) -> ir.Value:
        """What it gives."""
        return self.nodes[-1].outputs[0]


def _layer(part: str, uses: dict[str, list[tuple[ir.Node, int]]], *, biased: bool) -> _Layer:
    product = _only_user(part + WEIGHT, "MatMul", uses)
    if product.inputs[1] is None or product.inputs[1].producer() is not None:
        raise ConversionError(
            f"{part}{WEIGHT} is not what its input is multiplied by from the right"
        )
    layer = _Layer(part, product, _only_user(part + BIAS, "Add", uses) if biased else None)
    if layer.added is not None and not _only_use(product.outputs[0], layer.added):
        raise ConversionError(f"{part}{BIAS} is not added to the result of {product.name} alone")
    if layer.result.is_graph_output():
        raise ConversionError(
            f"{part} gives an output of the graph; it cannot be part of a packed layer"
        )
    return layer


def _only_user(
    parameter: str, operator: str, uses: dict[str, list[tuple[ir.Node, int]]]
) -> ir.Node:
    found = uses.get(parameter, [])
    if len(found) != 1 or found[0][0].op_type != operator or found[0][0].domain:
        users = ", ".join(f"{node.name} ({node.op_type})" for node, _ in found) or "nothing"
        raise ConversionError(
            f"{parameter} should be used by one {operator} to be packed; it is used by {users}",
            hint="--fuse none packs nothing",
        )
    return found[0][0]


def _only_use(value: ir.Value, node: ir.Node) -> bool:
    users = list(value.uses())
    return len(users) == 1 and users[0].node is node and not value.is_graph_output()


def _require_one_input(group: PackedLinear, layers: Sequence[_Layer]) -> None:
    """The same value, so that what made it, its norm above all, is the same, too."""
    inputs = [layer.product.inputs[0] for layer in layers]
    if any(value is not inputs[0] for value in inputs):
        read = ", ".join(
            f"{layer.module} reads {'nothing' if value is None else value.name}"
            for layer, value in zip(layers, inputs, strict=True)
        )
        raise ConversionError(
            f"layers that were to be packed do not read the same input: {read}",
            hint="--fuse none packs nothing",
        )
