"""Names that say which module a node or value belongs to."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

from peft_deploy.convert.passes.provenance import MODULE


class NameNodesPass(ir.passes.InPlacePass):
    """Names nodes ``/model/layers.0/self_attn/q_proj/MatMul`` and the values they make after them.

    Postcondition: names of nodes and of values are unique; inputs, outputs and weights keep theirs.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Renames; drops the module paths from the metadata."""
        graph = model.graph
        kept = {id(value) for value in graph.outputs}
        used: Counter[str] = Counter()
        for node in graph:
            base = f"{module_folder(node.metadata_props.pop(MODULE, ''))}/{node.op_type}"
            node.name = f"{base}_{used[base]}" if used[base] else base
            used[base] += 1
            for i, value in enumerate(node.outputs):
                if id(value) not in kept:
                    value.name = f"{node.name}_output_{i}"
        self._name_constants(graph)
        return ir.passes.PassResult(model, modified=True)

    @staticmethod
    def _name_constants(graph: ir.Graph) -> None:
        """Constants are numbered; weights are not initializers yet."""
        constants = list(graph.initializers.values())
        for i, value in enumerate(constants):
            value.name = f"constant.{i}.folded"
        for i, value in enumerate(constants):
            value.name = f"constant.{i}"


def module_folder(module: str) -> str:
    """``model.layers.0.mlp`` → ``/model/layers.0/mlp``: an index belongs to the list before it."""
    path = ""
    for part in filter(None, module.split(".")):
        path += f".{part}" if part.isdigit() else f"/{part}"
    return path
