"""Which module each node came from, and the rank of what it computes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from peft_deploy.families import NameMap

MODULE = "peft_deploy.module"  # key in a node's metadata while the graph is worked on
FETCH = "pd_op.fetch"  # Paddle's operator that makes a value an output

# Paddle2ONNX calls the j-th result of the k-th use of an operator p2o.<dialect>.<operator>.<k>.<j>, and puts the
# nodes that make up an operator before the one that carries its name.
_RESULT = re.compile(r"p2o\.(?P<op>\w+\.\w+?)\.(?P<use>\d+)\.(?P<result>\d+)(_\d+)?")


class RecordModulesPass(ir.passes.InPlacePass):
    """Writes the module path into every node's metadata and the known shapes into values.

    Precondition: the graph is as Paddle2ONNX wrote it.

    Args:
        operations: see :class:`~peft_deploy.convert.graph.ConvertedGraph`.
        names: maps PaddleNLP's module paths to Hugging Face's, which are the better known ones.
    """

    def __init__(self, operations: Mapping[str, list[dict[str, Any]]], names: NameMap) -> None:
        super().__init__()
        self._operations = operations
        self._names = names

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Annotates the graph."""
        waiting: list[ir.Node] = []
        outputs = {id(value): i for i, value in enumerate(model.graph.outputs)}
        for node in model.graph:
            waiting.append(node)
            use = self._use(node, outputs)
            if use is None:
                continue
            path = self._names.module_to_huggingface(use["module"]) if use["module"] else ""
            for member in waiting:
                member.metadata_props[MODULE] = path
            waiting = []
        return ir.passes.PassResult(model, modified=True)

    def _use(self, node: ir.Node, outputs: Mapping[int, int]) -> dict[str, Any] | None:
        """The operator of the program whose result the node makes.

        Args:
            node: of the graph.
            outputs: id of each output of the graph → its number.
        """
        found = None
        for value in node.outputs:
            if id(value) in outputs:
                op, use, result = FETCH, outputs[id(value)], 0
            elif match := _RESULT.fullmatch(value.name or ""):
                op, use, result = match["op"], int(match["use"]), int(match["result"])
            else:
                continue
            uses = self._operations.get(op, [])
            if use >= len(uses):
                continue
            found = uses[use]
            shapes = found["shapes"]
            shape = shapes[result] if result < len(shapes) else None
            if shape is not None:
                _set_shape(value, shape)
                if node.op_type == "Identity" and node.inputs[0] is not None:
                    _set_shape(node.inputs[0], shape)
        return found


def _set_shape(value: ir.Value, shape: list[int]) -> None:
    if value.shape is None and value.const_value is None:
        value.shape = ir.Shape([None if dim < 0 else dim for dim in shape])
