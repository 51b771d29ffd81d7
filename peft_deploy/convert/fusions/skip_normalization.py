"""A sum and the norm of it in one, onnxruntime's own operators.

In a layer the sum goes on as the residual, so that both are needed. onnxruntime itself, when it loads a graph, joins
only sums that nothing else reads, and only with layer norms.
"""

from __future__ import annotations

import onnx_ir as ir

from peft_deploy.convert.fusions.fusion import ORT, Fusion, NodeNames, folder_of
from peft_deploy.convert.fusions.heads import size
from peft_deploy.convert.opset import CONTRIB

_OUTPUTS, _SUM = 4, 3  # the norm, two that only training reads, and the sum
_AXES = 3  # [B, S, E]


class SkipFusion(Fusion):
    """``norm(a + b)``.

    Args:
        norm: the standard operator.
        joined: the operator that adds first.
    """

    def __init__(self, norm: str, joined: str) -> None:
        super().__init__(joined, level=ORT)
        self._norm = norm

    def apply(self, model: ir.Model, reasons: dict[str, str]) -> int:
        """See :class:`~peft_deploy.convert.fusions.fusion.Fusion`."""
        names = NodeNames(model.graph)
        nodes = [node for node in model.graph if node.op_type == self._norm and not node.domain]
        count = sum(self._join(model.graph, node, names) for node in nodes)
        if count:
            model.opset_imports[CONTRIB] = 1
            model.graph.sort()  # others may read the sum before it is normed
        return count

    def _join(self, graph: ir.Graph, norm: ir.Node, names: NodeNames) -> bool:
        total, axis = norm.inputs[0], norm.attributes.get("axis")
        added = None if total is None else total.producer()
        if total is None or added is None or added.op_type != "Add" or total.is_graph_output():
            return False
        if (axis is not None and axis.as_int() not in (-1, _AXES - 1)) or not _of_one_shape(
            *added.inputs
        ):
            return False
        epsilon = norm.attributes.get("epsilon")
        joined = ir.Node(
            CONTRIB,
            self.name,
            [*added.inputs, *norm.inputs[1:]],
            [ir.AttrFloat32("epsilon", 1e-5 if epsilon is None else epsilon.as_float())],
            num_outputs=_OUTPUTS,
        )
        name, folder = total.name, folder_of(norm)
        new = [joined.outputs[0], joined.outputs[_SUM]]
        ir.convenience.replace_nodes_and_values(
            graph, norm, [norm, added], [joined], [norm.outputs[0], total], new
        )
        names.name(joined, folder)
        joined.outputs[_SUM].name = name  # it is still what the layer gives
        for unread in joined.outputs[1:_SUM]:
            unread.name = ""
        return True


def _of_one_shape(one: ir.Value | None, other: ir.Value | None) -> bool:
    """Whether neither of two values [B, S, E] is broadcast, which the operators do in few cases only."""
    if one is None or other is None or one.shape is None or other.shape is None:
        return False
    if len(one.shape) != _AXES or len(other.shape) != _AXES:
        return False
    sizes = [(size(one, axis), size(other, axis)) for axis in range(_AXES)]
    return sizes[-1][0] is not None and all(a == b for a, b in sizes)


SKIP_RMS_NORMALIZATION = SkipFusion("RMSNormalization", "SkipSimplifiedLayerNormalization")
SKIP_LAYER_NORMALIZATION = SkipFusion("LayerNormalization", "SkipLayerNormalization")
