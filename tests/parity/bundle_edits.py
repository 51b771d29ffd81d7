"""Edits of an ONNX bundle on disk: the tools that faults are put in with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

Array = npt.NDArray[np.generic]


class GraphEdit:
    """The graph of a bundle with its weights, changed in memory and written back.

    Args:
        folder: the bundle.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._model = onnx.load(str(folder / "model.onnx"))
        self._tensors = {t.name: t for t in self._model.graph.initializer}
        manifest = json.loads((folder / "peft_deploy.json").read_text("utf-8"))
        self._packed: dict[str, list[str]] = manifest["graph"].get("packed", {})

    @property
    def weights(self) -> list[str]:
        return list(self._tensors)

    def weight(self, name: str) -> Array:
        """Of a layer that is packed with others, its columns of theirs."""
        name, columns = self._place(name)
        whole = numpy_helper.to_array(self._tensors[name])
        return (whole[..., columns] if whole.ndim else whole).copy()

    def set_weight(self, name: str, value: Array) -> None:
        """The new value has the old one's type and shape, and is another one."""
        old = self.weight(name)
        value = np.array(value, old.dtype, order="C")
        assert value.shape == old.shape, (name, value.shape, old.shape)
        assert not np.array_equal(value, old), f"{name} is what it was"
        name, columns = self._place(name)
        whole = numpy_helper.to_array(self._tensors[name]).copy()
        if whole.ndim:
            whole[..., columns] = value
        else:
            whole = value
        self._tensors[name].CopyFrom(numpy_helper.from_array(whole, name))

    def _place(self, name: str) -> tuple[str, slice]:
        """The initializer that a weight lies in, and its columns there."""
        module, _, kind = name.rpartition(".")
        packed = next((p for p, parts in self._packed.items() if module in parts), None)
        if name in self._tensors or packed is None:
            return name, slice(None)
        number = self._packed[packed].index(module)
        ends = np.cumsum([0, *self._widths(packed)])
        return f"{packed}.{kind}", slice(ends[number], ends[number + 1])

    def _widths(self, packed: str) -> list[int]:
        """Of the layers in a packed one, as the Split behind it has them."""
        value = f"{packed}.weight"
        while True:
            node = next(n for n in self._model.graph.node if value in n.input)
            if node.op_type == "Split":
                return numpy_helper.to_array(self._tensors[node.input[1]]).tolist()
            value = node.output[0]

    def node(self, name: str) -> onnx.NodeProto:
        return next(n for n in self._model.graph.node if n.name == name)

    def constant(self, value: Array | float) -> str:
        """The name of a new initializer."""
        array = np.asarray(value, np.float32 if isinstance(value, float) else None)
        name = f"fault.{len(self._tensors)}"
        tensor = numpy_helper.from_array(array, name)
        self._model.graph.initializer.append(tensor)
        self._tensors[name] = self._model.graph.initializer[-1]
        return name

    def input_of(self, name: str, index: int = 1) -> Array:
        """The constant that a node takes there."""
        return self.weight(self.node(name).input[index])

    def add(
        self, before: str, operator: str, *inputs: str, name: str = "", **attributes: object
    ) -> str:
        """Puts a new node before another one and gives the value that it makes."""
        name = name or f"{before}.fault{len(self._model.graph.node)}"
        node = onnx.helper.make_node(operator, list(inputs), [f"{name}_value"], name, **attributes)
        position = [n.name for n in self._model.graph.node].index(before)
        self._model.graph.node.insert(position, node)
        return node.output[0]

    def on_input(
        self, name: str, index: int, operator: str, *more: str, **attributes: object
    ) -> None:
        """Lets a value pass through a new node on its way into this one node."""
        node = self.node(name)
        value = self.add(name, operator, node.input[index], *more, **attributes)
        self.node(name).input[index] = value

    def on_output(
        self, name: str, index: int, operator: str, *more: str, **attributes: object
    ) -> None:
        """Lets a value pass through a new node on its way to everybody."""
        node = self.node(name)
        value = node.output[index]
        node.output[index] = f"{name}.{value}"
        made = onnx.helper.make_node(
            operator, [node.output[index], *more], [value], f"{name}.fault", **attributes
        )
        position = [n.name for n in self._model.graph.node].index(name)
        self._model.graph.node.insert(position + 1, made)

    def exchange_outputs(self, one: str, other: str) -> None:
        """Two outputs of the graph get each other's values; inside, nothing changes."""
        names = (one, other)
        for node in self._model.graph.node:
            for values in (node.input, node.output):
                for i, value in enumerate(values):
                    if value in names:
                        values[i] = f"{value}.inner"
        last = self._model.graph.node[-1]
        for inner, name in ((one, other), (other, one)):
            node = onnx.helper.make_node("Identity", [f"{inner}.inner"], [name], f"/{name}")
            self._model.graph.node.insert(len(self._model.graph.node) - 1, node)
        assert self._model.graph.node[-1].name == last.name

    def save(self) -> None:
        """Writes the bundle's model and weights anew."""
        (self._folder / "model.onnx.data").unlink(missing_ok=True)
        onnx.save(
            self._model,
            str(self._folder / "model.onnx"),
            save_as_external_data=True,
            location="model.onnx.data",
        )


Edit = Callable[[GraphEdit], None]


def change(name: str, value: Callable[[Array], Array]) -> Edit:
    """Another value of one weight."""
    return lambda graph: graph.set_weight(name, value(graph.weight(name)))


def exchange(one: str, other: str) -> Edit:
    """Two weights of one shape change places."""

    def edit(graph: GraphEdit) -> None:
        first, second = graph.weight(one), graph.weight(other)
        graph.set_weight(one, second)
        graph.set_weight(other, first)

    return edit


def rewire(name: str, index: int, value: str) -> Edit:
    """A node reads another value."""

    def edit(graph: GraphEdit) -> None:
        assert graph.node(name).input[index] != value
        graph.node(name).input[index] = value

    return edit


def operator(name: str, kind: str) -> Edit:
    """A node of another kind."""

    def edit(graph: GraphEdit) -> None:
        graph.node(name).op_type = kind

    return edit


def own_constant(name: str, index: int, value: Callable[[Array], Array]) -> Edit:
    """One node, and not the others that share it, takes another constant."""

    def edit(graph: GraphEdit) -> None:
        graph.node(name).input[index] = graph.constant(value(graph.input_of(name, index)))

    return edit


def shared_constant(name: str, index: int, value: Callable[[Array], Array]) -> Edit:
    """Every node that takes the same constant as this one takes another."""

    def edit(graph: GraphEdit) -> None:
        constant = graph.node(name).input[index]
        graph.set_weight(constant, value(graph.weight(constant)))

    return edit


def attribute(name: str, key: str, value: object) -> Edit:
    """Another attribute of a node."""

    def edit(graph: GraphEdit) -> None:
        node = graph.node(name)
        kept = [a for a in node.attribute if a.name != key]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute(key, value)])

    return edit


def on_input(name: str, index: int, kind: str, *constants: float, **attributes: object) -> Edit:
    """A value goes through another operator before this node."""

    def edit(graph: GraphEdit) -> None:
        more = [graph.constant(np.array(c, np.float32)) for c in constants]
        graph.on_input(name, index, kind, *more, **attributes)

    return edit


def on_output(name: str, index: int, kind: str, *constants: float, **attributes: object) -> Edit:
    """A value goes through another operator behind this node."""

    def edit(graph: GraphEdit) -> None:
        more = [graph.constant(np.array(c, np.float32)) for c in constants]
        graph.on_output(name, index, kind, *more, **attributes)

    return edit
