"""A bundle's graph with inner values among its outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from peft_deploy.bundle import MODEL
from peft_deploy.errors import ExecutionError
from peft_deploy.parity.bisect.activation import Activation
from peft_deploy.runtime import check_external_data
from peft_deploy.runtime.exact_arithmetic import without_rounding
from peft_deploy.runtime.onnx_runner import NO_PREPACKING, WEIGHTS_FOLDER
from peft_deploy.signature import present_names

if TYPE_CHECKING:
    import onnx_ir as ir

# Weights stay in the file, which is only mapped: none is cast before it is needed, nor (NO_PREPACKING) laid out anew.
_NO_FOLDING = ("ConstantFolding",)


class ExposedGraph:
    """The graph of a bundle, looked into.

    Args:
        folder: the bundle, in ONNX format.
        active: what is active beside it.

    Attributes:
        caches: outputs that are a layer's grown keys or values.

    Raises:
        BundleError: its weights lie outside of it.
    """

    def __init__(self, folder: Path, active: Activation | None = None) -> None:
        check_external_data(folder / MODEL)
        self.active = active or Activation()
        self._folder = folder
        self._model = self.read()
        outputs = [str(value.name) for value in self._model.graph.outputs]
        self.caches = frozenset(present_names(len(outputs))) & frozenset(outputs)
        self._nodes: list[ir.Node] = list(self._model.graph)
        self._order = {id(node): i for i, node in enumerate(self._nodes)}
        self._producers = {str(value.name): node for node in self._nodes for value in node.outputs}

    def read(self) -> ir.Model:
        """A copy of the graph, computing as the check does; its weights are not read."""
        import onnx_ir as ir

        model = ir.load(self._folder / MODEL)
        without_rounding(model)
        return model

    def output_of(self, scope: str) -> tuple[str, int] | None:
        """Name and position of the value that a module gives to the rest of the graph.

        Args:
            scope: the module's folder in the names of nodes.

        Returns:
            The last such value that is no output of the graph; None when there is none.
        """
        members = [node for node in self._nodes if _is_under(node, scope)]
        if not members:
            return self._part_of(scope)
        inside = {id(node) for node in members}
        for node in reversed(members):
            for value in node.outputs:
                if value.is_graph_output() and not self._is_last(node):
                    continue
                users = [use.node for use in value.uses()]
                if value.is_graph_output() or any(id(user) not in inside for user in users):
                    return str(value.name), self._order[id(node)]
        return None

    def _part_of(self, scope: str) -> tuple[str, int] | None:
        """What a module gives that is part of a packed one: its result has its name, and no node has."""
        for node in reversed(self._nodes):
            for value in node.outputs:
                if str(value.name).startswith(f"{scope}/"):
                    return str(value.name), self._order[id(node)]
        return None

    def _is_last(self, node: ir.Node) -> bool:
        """Whether the node ends the graph: its output is a module's, where a cache's is not."""
        return node is self._nodes[-1]

    def around(self, scope: str, output: str) -> tuple[str, ...]:
        """The other values inside of a module, and those that are made of its output next.

        Args:
            scope: the module's folder in the names of nodes.
            output: its output.
        """
        producer = self._producer(output)
        assert producer is not None
        members = [node for node in self._nodes if _is_under(node, scope)]
        users = [use.node for value in producer.outputs for use in value.uses()]
        names = [
            str(v.name) for node in (*reversed(members), *users) for v in node.outputs if v.name
        ]
        return tuple(dict.fromkeys(name for name in names if name != output))

    def input_of(self, scope: str) -> tuple[str, int] | None:
        """Name and position of the one value that a module takes from another node; None for several or none."""
        members = [node for node in self._nodes if _is_under(node, scope)]
        inside = {id(node) for node in members}
        found: dict[str, int] = {}
        for node in members:
            for value in node.inputs:
                producer = None if value is None else value.producer()
                if producer is not None and id(producer) not in inside:
                    assert value is not None
                    found[str(value.name)] = self._order[id(producer)]
        return next(iter(found.items())) if len(found) == 1 else None

    def in_types(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """The feeds, floating-point arrays in the types of the graph's inputs."""
        types = {v.name: v.dtype.numpy() for v in self._model.graph.inputs if v.dtype is not None}
        return {
            name: array.astype(types.get(name, array.dtype), copy=False)
            if array.dtype.kind == "f"
            else array
            for name, array in feeds.items()
        }

    def run(
        self, feeds: Mapping[str, npt.NDArray[Any]], values: Iterable[str]
    ) -> dict[str, npt.NDArray[Any]]:
        """Inner values by name, for a full set of inputs. Nothing is computed that they do not need.

        Args:
            feeds: as for the graph without anything active.
            values: names of values.

        Raises:
            ExecutionError: onnxruntime refuses the graph.
        """
        import onnx_ir as ir
        import onnxruntime as ort

        names = list(dict.fromkeys(values))
        if not names:  # to onnxruntime that would mean all
            return {}
        model = self.read()
        known = {v.name: v for node in model.graph for v in node.outputs}
        # onnxruntime drops what no output needs: behind the first bad layer, that is most of a model
        model.graph.outputs.clear()
        model.graph.outputs.extend(known[name] for name in names)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry(WEIGHTS_FOLDER, str(self._folder))
        options.add_session_config_entry(NO_PREPACKING, "1")
        try:
            data = ir.to_proto(model).SerializeToString()
            session = ort.InferenceSession(
                data,
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=list(_NO_FOLDING),
            )
            slots = session.get_overridable_initializers()
            wanted = {node.name for node in (*session.get_inputs(), *slots)}
            given = {k: v for k, v in self.active.feeds(feeds).items() if k in wanted}
            results = [np.asarray(array) for array in session.run(names, given)]
        except Exception as exc:  # onnxruntime's errors have no common base of their own
            raise ExecutionError(
                f"the graph does not run with inner values as outputs: {exc}"
            ) from exc
        found = dict(zip(names, results, strict=True))
        hidden = self.active.without_hidden
        return {
            name: hidden(array) if name in self.caches else array for name, array in found.items()
        }

    def starts_of(
        self, feeds: Mapping[str, npt.NDArray[Any]], names: Sequence[str]
    ) -> dict[str, npt.NDArray[Any]]:
        """Values that operators start from: inputs, slots whether filled or empty, and inner values.

        Args:
            feeds: as for :meth:`run`.
            names: of the values.
        """
        given = self.active.feeds(feeds)
        empty = [
            name for name in names if name not in given and name in self._model.graph.initializers
        ]
        found = {name: given[name] for name in names if name in given}
        found |= {name: self.weight(name) for name in empty}
        return found | self.run(feeds, [name for name in names if name not in found])

    def between(self, bad: str, good: Iterable[str]) -> tuple[list[str], list[str]]:
        """The nodes that make a value out of good ones.

        Args:
            bad: the value.
            good: names of values to stop at.

        Returns:
            Names of the nodes in the graph's order, and of the values that they start from.
        """
        stops, starts = set(good), dict[str, None]()
        waiting, found = [self._producer(bad)], dict[int, str]()
        while waiting:
            node = waiting.pop()
            if node is None or self._order[id(node)] in found:
                continue
            found[self._order[id(node)]] = str(node.name)
            for value in node.inputs:
                if value is None or (value.is_initializer() and not value.is_graph_input()):
                    continue
                if value.producer() is None or value.name in stops:
                    starts[str(value.name)] = None
                else:
                    waiting.append(value.producer())
        return [found[i] for i in sorted(found)], list(starts)

    def made_by(self, nodes: Iterable[str]) -> set[str]:
        """Names of the values that some nodes make."""
        wanted = set(nodes)
        return {str(v.name) for node in self._nodes if node.name in wanted for v in node.outputs}

    def made_of(self, values: Iterable[str]) -> set[str]:
        """Names of some values and of all inner values that they are made of."""
        waiting, found = [self._producer(value) for value in values], set[int]()
        while waiting:
            node = waiting.pop()
            if node is not None and id(node) not in found:
                found.add(id(node))
                waiting += [v.producer() for v in node.inputs if v is not None]
        return {str(v.name) for node in self._nodes if id(node) in found for v in node.outputs}

    def initializers_of(self, nodes: Sequence[str]) -> list[str]:
        """Names of the weights and constants of some nodes."""
        wanted = set(nodes)
        names = (
            str(value.name)
            for node in self._nodes
            if node.name in wanted
            for value in node.inputs
            if value is not None and value.is_initializer() and not value.is_graph_input()
        )
        return list(dict.fromkeys(names))

    def weight(self, name: str) -> npt.NDArray[Any]:
        """An initializer's values."""
        value = self._model.graph.initializers[name].const_value
        assert value is not None
        return np.asarray(value.numpy())

    def position(self, value: str) -> int:
        """Of the node that makes a value, in the graph's order."""
        producer = self._producer(value)
        return -1 if producer is None else self._order[id(producer)]

    def _producer(self, value: str) -> ir.Node | None:
        return self._producers.get(value)


def _is_under(node: ir.Node, scope: str) -> bool:
    return (node.name or "").startswith(f"{scope}/")
