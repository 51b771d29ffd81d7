"""A bundle's graph with only some of its layers, for models that do not fit into memory whole.

The layers of a model are alike: one takes what the one before it gives. So a graph can be cut: what a layer took from
the one before it, which is left out, it takes from the last one that is kept. What is left computes what PaddleNLP's
model with just these layers computes, inputs, outputs, caches and all, and can be held to it by the usual check.

That the layers left out are wired like the ones that are kept is compared node by node (:meth:`LayeredGraph.unlike`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peft_deploy.bundle import MODEL
from peft_deploy.errors import ExecutionError
from peft_deploy.runtime import check_external_data
from peft_deploy.runtime.exact_arithmetic import without_rounding
from peft_deploy.signature import past_names, present_names

if TYPE_CHECKING:
    import onnx_ir as ir

_LAYER = re.compile(r"(/[^.]*)\.(\d+)(?=/)")  # as node_names.module_folder writes it
_NUMBERED = re.compile(r"(.*?)\.(\d+)\.")  # an initializer's name, as in checkpoints
_ANY = "{i}"
_OWN, _PREVIOUS = "this layer", "the layer before"


class LayeredGraph:
    """The graph of a bundle as a stack of layers.

    Args:
        folder: the bundle, in ONNX format.
        num_layers: L.

    Raises:
        BundleError: its weights lie outside of it.
        ExecutionError: its nodes do not say which of L layers they belong to.
    """

    def __init__(self, folder: Path, num_layers: int) -> None:
        import onnx_ir as ir

        check_external_data(folder / MODEL)
        self.num_layers = num_layers
        self._model = ir.load(folder / MODEL)
        self._nodes: list[ir.Node] = list(self._model.graph)
        self._by_name = {str(node.name): node for node in self._nodes}
        found = {self._layer(node) for node in self._nodes} - {None}
        if found != set(range(num_layers)):
            raise ExecutionError(
                f"the graph's nodes belong to {len(found)} layers, the model has {num_layers}; "
                "it cannot be checked layer by layer"
            )

    def shorten(self, layers: Sequence[int]) -> bytes:
        """The graph with these layers only, activations in float32; this object is of no use afterwards.

        Args:
            layers: indices, ascending, the first layer's among them.

        Returns:
            The serialized model; its weights are where they were.

        Raises:
            ExecutionError: the layers are not alike, so that one cannot take another's place.
        """
        import onnx_ir as ir

        for i, layer in enumerate(layers):
            before = layers[i - 1] if i else 0
            for node in self._nodes:
                if self._layer(node) == layer and i:
                    self._rewire(node, layer - 1, before)
        for node in self._nodes:
            if self._layer(node) is None:
                self._rewire(node, self.num_layers - 1, layers[-1])
        self._keep_ends(layers)
        self._drop_unused()
        without_rounding(self._model)
        return bytes(ir.to_proto(self._model).SerializeToString())

    def unlike(self) -> dict[int, str]:
        """Layers that are not like the last one → the first thing about them that is not.

        Of a layer's nodes, the operator, the attributes, where each input comes from, and the types and shapes of its
        weights are compared. The first layer makes what others share, and is no measure for them.
        """
        pattern = dict(self._describe(self.num_layers - 1))
        wrong: dict[int, str] = {}
        for layer in range(1, self.num_layers):
            found = dict(self._describe(layer))
            # of the second one, the first layer is the one before it, too
            wanted = _merged_sources(pattern) if layer == 1 else pattern
            found = _merged_sources(found) if layer == 1 else found
            names = dict.fromkeys([*wanted, *found])
            odd = next((name for name in names if found.get(name) != wanted.get(name)), None)
            if odd is not None:
                text = _odd(found.get(odd), wanted.get(odd), self.num_layers - 1)
                wrong[layer] = f"{odd.replace(_ANY, str(layer))}: {text}"
        return wrong

    def _layer(self, node: ir.Node) -> int | None:
        return _layer_of(node.name or "")

    def _rewire(self, node: ir.Node, skipped: int, before: int) -> None:
        """Lets a node take from one layer what it took from another."""
        if skipped == before:
            return
        for i, value in enumerate(node.inputs):
            producer = None if value is None else value.producer()
            if producer is None or self._layer(producer) != skipped:
                continue
            twin = self._twin(producer, skipped, before)
            assert value is not None
            node.replace_input_with(i, twin.outputs[value.index() or 0])

    def _twin(self, node: ir.Node, layer: int, other: int) -> ir.Node:
        name = _LAYER.sub(lambda m: f"{m[1]}.{other}", str(node.name), count=1)
        twin = self._by_name.get(name)
        if twin is None or twin.op_type != node.op_type:
            raise ExecutionError(
                f"layers {layer} and {other} of the graph are not alike: {node.name} has no counterpart; "
                "it cannot be checked layer by layer"
            )
        return twin

    def _keep_ends(self, layers: Sequence[int]) -> None:
        """Leaves the inputs and outputs of the layers that are kept, counted anew."""
        graph = self._model.graph
        for names, ends in ((past_names, graph.inputs), (present_names, graph.outputs)):
            old = names(self.num_layers)
            new = dict(
                zip((old[2 * i + k] for i in layers for k in (0, 1)), old, strict=False)
            )  # old names in order are what new ones are called
            for value in [v for v in ends if v.name in set(old) - new.keys()]:
                ends.remove(value)
            for value in ends:
                if value.name in new:
                    value.name = new[value.name]

    def _drop_unused(self) -> None:
        graph = self._model.graph
        needed: set[int] = set()
        waiting = [value.producer() for value in graph.outputs]
        while waiting:
            node = waiting.pop()
            if node is not None and id(node) not in needed:
                needed.add(id(node))
                waiting += [v.producer() for v in node.inputs if v is not None]
        for node in reversed(self._nodes):
            if id(node) not in needed:
                graph.remove(node, safe=True)
        for name, value in list(graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                graph.initializers.pop(name)
                if value in graph.inputs:
                    graph.inputs.remove(value)

    def _describe(self, layer: int) -> Iterator[tuple[str, Any]]:
        """A layer's nodes by name, the layer's own index left out everywhere."""
        for node in self._nodes:
            if self._layer(node) == layer:
                inputs = [self._describe_value(v, layer) for v in node.inputs]
                attributes = {n: _plain(a) for n, a in node.attributes.items()}
                made = [self._output_name(v, layer) for v in node.outputs]
                yield (
                    _relative(str(node.name), layer),
                    (node.domain, node.op_type, attributes, inputs, made),
                )

    def _describe_value(self, value: ir.Value | None, layer: int) -> Any:
        if value is None:
            return None
        producer = value.producer()
        if producer is not None:
            place = self._layer(producer)
            where = _OWN if place == layer else _PREVIOUS if place == layer - 1 else place
            name = _relative(str(producer.name), place)
            return where, name, value.index()
        if value.is_initializer():
            shape = None if value.shape is None else tuple(value.shape)
            return _anonymous(str(value.name), layer), value.dtype, shape
        return _anonymous(str(value.name), layer)

    def _output_name(self, value: ir.Value, layer: int) -> str | None:
        return _anonymous(str(value.name), layer) if value.is_graph_output() else None


def _layer_of(name: str) -> int | None:
    """The layer that a node belongs to by its name: of a module's path, or of the weight that it converts."""
    match = _LAYER.match(name) if name.startswith("/") else _NUMBERED.match(name)
    return int(match[2]) if match else None


def _relative(name: str, layer: int | None) -> str:
    """A node's name without the index of its layer."""
    if layer is None or not name.startswith("/"):
        return name if layer is None else _anonymous(name, layer)
    match = _LAYER.match(name)
    assert match is not None
    return f"{match[1]}.{_ANY}{name[match.end() :]}"


def _anonymous(name: str, layer: int) -> str:
    """A weight's or a cache's name without the index of its layer."""
    match = _NUMBERED.match(name)
    if match is None or int(match[2]) != layer:
        return name
    return f"{match[1]}.{_ANY}.{name[match.end() :]}"


def _plain(attribute: Any) -> Any:
    value = getattr(attribute, "value", attribute)
    return np.asarray(value.numpy()).tobytes() if hasattr(value, "numpy") else value


def _merged_sources(nodes: dict[str, Any]) -> dict[str, Any]:
    """The same with the first layer and the one before taken for one."""

    def merged(source: Any) -> Any:
        is_value = isinstance(source, tuple) and source and source[0] == 0
        return (_PREVIOUS, *source[1:]) if is_value else source

    return {
        name: (domain, operator, attributes, [merged(source) for source in inputs], made)
        for name, (domain, operator, attributes, inputs, made) in nodes.items()
    }


def _odd(found: Any, wanted: Any, pattern: int) -> str:
    if found is None:
        return "it is not there"
    if wanted is None:
        return "other layers do not have it"
    texts = ("domain", "operator", "attributes", "inputs", "outputs")
    which = next(i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
    return f"{texts[which]} {found[which]!r}, where layer {pattern} has {wanted[which]!r}"


def sample_layers(num_layers: int, count: int, seed: int = 0) -> tuple[int, ...]:
    """The layers to check: the first, the last, and others between them.

    Args:
        num_layers: L.
        count: how many, at least 1.
        seed: 0 for layers that lie evenly, otherwise for others drawn at random.
    """
    count = min(count, num_layers)
    if count < 3 or seed == 0:
        spread = np.linspace(0, num_layers - 1, count).round().astype(int)
        return tuple(sorted({int(i) for i in spread}))
    inner = np.random.default_rng(seed).choice(num_layers - 2, count - 2, replace=False) + 1
    return tuple(sorted({0, num_layers - 1, *(int(i) for i in inner)}))
