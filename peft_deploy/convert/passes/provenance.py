"""Which module each node came from, and the rank of what it computes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from peft_deploy.families import NameMap

MODULE = "peft_deploy.module"  # key in a node's metadata while the graph is worked on

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
        for node in model.graph:
            waiting.append(node)
            use = self._use(node)
            if use is None:
                continue
            path = self._names.module_to_huggingface(use["module"]) if use["module"] else ""
            for member in waiting:
                member.metadata_props[MODULE] = path
            waiting = []
        return ir.passes.PassResult(model, modified=True)

    def _use(self, node: ir.Node) -> dict[str, Any] | None:
        """The operator of the program whose result the node makes."""
        found = None
        for value in node.outputs:
            match = _RESULT.fullmatch(value.name or "")
            uses = self._operations.get(match["op"], []) if match else []
            if match is None or int(match["use"]) >= len(uses):
                continue
            found = uses[int(match["use"])]
            shapes = found["shapes"]
            shape = shapes[int(match["result"])] if int(match["result"]) < len(shapes) else None
            if shape is not None:
                _set_shape(value, shape)
                if node.op_type == "Identity" and node.inputs[0] is not None:
                    _set_shape(node.inputs[0], shape)
        return found


def _set_shape(value: ir.Value, shape: list[int]) -> None:
    if value.shape is None and value.const_value is None:
        value.shape = ir.Shape([None if dim < 0 else dim for dim in shape])
