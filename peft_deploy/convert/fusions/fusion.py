"""What a fusion is, and how rewrite rules become one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

ONNX, ORT = "onnx", "ort"


class Fusion(ABC):
    """Nodes that become one operator.

    Args:
        name: the operator that it makes; what the manifest calls it.
        signs: operators that are not there any more once every pattern was found: nodes of these kinds that are
            still there at the end are named in the report.
        level: ``"onnx"`` for standard operators, ``"ort"`` for those of onnxruntime.
    """

    def __init__(self, name: str, *, signs: Collection[str] = (), level: str = ONNX) -> None:
        self.name = name
        self.signs = frozenset(signs)
        self.level = level

    @abstractmethod
    def apply(self, model: ir.Model, reasons: dict[str, str]) -> int:
        """Fuses what it finds, in place.

        Args:
            model: its weights are bound.
            reasons: gets, for a pattern that was found and not taken, module (folder of its nodes) → why.

        Returns:
            How often.
        """


class RuleFusion(Fusion):
    """A fusion by rewrite rules, tried at every node in the order given.

    New nodes are named after the folder of the node at which the pattern ends
    (``/model/layers.0/input_layernorm/RMSNormalization``), so that a graph's nodes still say whose they are.

    Args:
        name: the operator that it makes.
        rules: of onnxscript; a rule's check gives its reason with ``MatchResult().fail(reason)``.
        signs: see :class:`Fusion`.
        level: see :class:`Fusion`.
    """

    def __init__(
        self,
        name: str,
        rules: Sequence[pattern.RewriteRule],
        *,
        signs: Collection[str] = (),
        level: str = ONNX,
    ) -> None:
        super().__init__(name, signs=signs, level=level)
        self._rules = tuple(rules)

    def apply(self, model: ir.Model, reasons: dict[str, str]) -> int:
        """Walks the graph once, in its order; a node that was put in is not looked at again."""
        names = NodeNames(model.graph)
        tracer = _Reasons(reasons)
        count = 0
        for node in list(model.graph):
            if node.graph is not None and self._rewrite(model, node, names, tracer):
                count += 1
        if count:
            model.graph.sort()  # a pattern of several outputs may end before what one of its new nodes needs
        return count

    def _rewrite(self, model: ir.Model, node: ir.Node, names: NodeNames, tracer: _Reasons) -> bool:
        for rule in self._rules:
            found = rule.try_rewrite(model, model.graph, node, tracer=tracer)
            if found is None:
                continue
            for constant in found.new_initializers:
                names.add_initializer(constant)
            ir.convenience.replace_nodes_and_values(
                model.graph,
                node,
                found.match.nodes if rule.remove_nodes else [],
                found.new_nodes,
                found.match.outputs,
                found.new_outputs,
            )
            for new in found.new_nodes:
                names.name(new, folder_of(node))
            return True
        return False


class NodeNames:
    """Names for nodes, values and initializers that fusions add to a graph.

    Args:
        graph: to name things in.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._used = {node.name or "" for node in graph}

    def name(self, node: ir.Node, folder: str) -> None:
        """Names a node after a folder and its operator, and what it makes after itself."""
        self._used.discard(node.name or "")
        node.name = self._free(f"{folder}/{node.op_type}", self._used.__contains__)
        self._used.add(node.name)
        for i, value in enumerate(node.outputs):
            if not value.is_graph_output():
                value.name = f"{node.name}_output_{i}"

    def add_initializer(self, value: ir.Value) -> None:
        """Registers a constant under its name, or one with a number where that is taken."""
        value.name = self._free(value.name or "constant", self._graph.initializers.__contains__)
        self._graph.register_initializer(value)

    @staticmethod
    def _free(base: str, taken: Callable[[str], bool]) -> str:
        name, number = base, 0
        while taken(name):
            number += 1
            name = f"{base}_{number}"
        return name


class _Reasons(pattern.MatchingTracer):
    """Keeps why a pattern that was there was not taken."""

    def __init__(self, reasons: dict[str, str]) -> None:
        super().__init__()
        self._reasons = reasons

    def log(
        self,
        rule: pattern.RewriteRule,
        container: ir.Graph | ir.Function,
        node: ir.Node,
        match_result: pattern.MatchResult,
        status: pattern.MatchStatus,
    ) -> None:
        """Called for every attempt; only those that a check refused have something to say."""
        refused = (pattern.MatchStatus.CONDITION_FAILED, pattern.MatchStatus.REPLACEMENT_FAILED)
        if status in refused:
            self._reasons[folder_of(node)] = match_result.reason or "the rule's check failed"


def folder_of(node: ir.Node) -> str:
    """``/model/layers.0/mlp`` of ``/model/layers.0/mlp/Mul_1``: the module that a node belongs to."""
    return (node.name or "").rpartition("/")[0]


def number(value: ir.Value | None) -> float | None:
    """The number that a constant of one element holds; None for anything else.

    A constant of more than one axis is none: it may raise the rank of what it is computed with.
    """
    constant = None if value is None else value.const_value
    if constant is None or constant.size != 1 or len(constant.shape) > 1:
        return None
    return float(constant.numpy().reshape(()))


def axes_of(node: ir.Node) -> tuple[int, ...] | None:
    """The axes of a reduction, which are an attribute up to opset 17 and an input since; None where unknown."""
    found: Any = node.attributes.get("axes")
    if found is not None:
        return tuple(found.as_ints())
    given = node.inputs[1] if len(node.inputs) > 1 else None
    if given is None or given.const_value is None:
        return None
    return tuple(int(axis) for axis in given.const_value.numpy().reshape(-1))
