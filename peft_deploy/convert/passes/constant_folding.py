"""Nodes whose inputs are all constants."""

from __future__ import annotations

import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

MAX_ELEMENTS = 1024  # of any input: shapes, axes and scalars, never a weight


class FoldConstantsPass(ir.passes.InPlacePass):
    """Replaces nodes on small constants by their result, computed by onnx's reference implementation.

    Postcondition: no node of the default domain has only constant inputs of up to :data:`MAX_ELEMENTS` elements.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Folds in topological order, so that chains disappear in one go."""
        modified = False
        outputs = {id(value) for value in model.graph.outputs}
        for node in list(model.graph):
            if not _foldable(node) or any(id(value) in outputs for value in node.outputs):
                continue
            results = _evaluate(node, model.opset_imports[""])
            for value, result in zip(node.outputs, results, strict=True):
                constant = ir.Value(name=f"{value.name}.folded", const_value=result)
                constant.shape, constant.dtype = ir.Shape(result.numpy().shape), result.dtype
                model.graph.register_initializer(constant)
                value.replace_all_uses_with(constant)
            model.graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified=modified)


def _foldable(node: ir.Node) -> bool:
    if node.domain or not node.inputs:
        return False
    return all(
        value is not None
        and value.const_value is not None
        and value.const_value.size <= MAX_ELEMENTS
        for value in node.inputs
    )


def _evaluate(node: ir.Node, opset: int) -> list[ir.TensorProtocol]:
    inputs = [ir.Value(name=f"x{i}") for i in range(len(node.inputs))]
    copy = ir.Node(
        "",
        node.op_type,
        inputs,
        attributes=list(node.attributes.values()),
        num_outputs=len(node.outputs),
    )
    for i, value in enumerate(copy.outputs):
        value.name = f"y{i}"
    evaluator = ReferenceEvaluator(ir.to_proto(copy), opsets={"": opset})
    feeds = {
        f"x{i}": value.const_value.numpy()
        for i, value in enumerate(node.inputs)
        if value is not None and value.const_value is not None
    }
    return [ir.tensor(result) for result in evaluator.run(None, feeds)]
