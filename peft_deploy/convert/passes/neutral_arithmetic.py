"""Multiplication by one, addition of zero."""

from __future__ import annotations

import onnx_ir as ir

# Operator → (the operand that changes nothing, positions in which it may stand).
_NEUTRAL = {"Mul": (1.0, (0, 1)), "Div": (1.0, (1,)), "Add": (0.0, (0, 1)), "Sub": (0.0, (1,))}


class RemoveNeutralArithmeticPass(ir.passes.InPlacePass):
    """Removes ``x * 1``, ``x / 1``, ``x + 0`` and ``x - 0``.

    Only where the constant is a single number whose rank is not above that of x, so that the result has x's
    shape; where x's rank is not known, only for a constant of rank 0. (-0.0 + 0 is 0.0: equal in every comparison.)
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewires the users of such a node to its other operand."""
        modified = False
        outputs = {id(value) for value in model.graph.outputs}
        for node in list(model.graph):
            kept = _kept_operand(node)
            if kept is None or id(node.outputs[0]) in outputs:
                continue
            node.outputs[0].replace_all_uses_with(kept)
            model.graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified=modified)


def _kept_operand(node: ir.Node) -> ir.Value | None:
    if node.op_type not in _NEUTRAL or node.domain or len(node.inputs) != 2:
        return None
    neutral, positions = _NEUTRAL[node.op_type]
    for position in positions:
        constant, other = node.inputs[position], node.inputs[1 - position]
        if constant is None or other is None or constant.const_value is None:
            continue
        tensor = constant.const_value
        if tensor.size != 1:
            continue
        rank = len(tensor.shape)
        if rank and (other.shape is None or len(other.shape) < rank):
            continue
        if float(tensor.numpy().reshape(())) == neutral:
            return other
    return None
