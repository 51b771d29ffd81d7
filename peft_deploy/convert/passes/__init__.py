"""What is done to a converted graph, in order. Each pass is one file with its pre- and postcondition."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from peft_deploy.convert.graph import ConvertedGraph
from peft_deploy.convert.passes.constant_folding import FoldConstantsPass
from peft_deploy.convert.passes.interface import ApplySignaturePass
from peft_deploy.convert.passes.neutral_arithmetic import RemoveNeutralArithmeticPass
from peft_deploy.convert.passes.node_names import NameNodesPass
from peft_deploy.convert.passes.provenance import RecordModulesPass
from peft_deploy.families import NameMap
from peft_deploy.signature import GraphSignature

__all__ = ["run_pipeline"]


def run_pipeline(
    converted: ConvertedGraph, signature: GraphSignature, names: NameMap
) -> dict[str, int]:
    """Cleans the graph up in place.

    Its weights are not bound yet, so that no pass can take two equal ones for one.

    Args:
        converted: the graph, its weights dangling.
        signature: the names and dimensions its inputs and outputs get.
        names: for the module paths in the names of nodes.

    Returns:
        Pass → how many nodes it removed.
    """
    pipeline: tuple[ir.passes.PassBase, ...] = (
        # First: it recognizes values by the names that Paddle2ONNX gave them, and the next pass drops those.
        RecordModulesPass(converted.operations, names),
        # Nearly every operator comes with an Identity, and inputs of scale come through one.
        common.IdentityEliminationPass(),
        # Constants become initializers, which is where the following passes look for them.
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        # Paddle's scale becomes Mul and Add whatever its numbers; needs the ranks that the first pass recorded.
        RemoveNeutralArithmeticPass(),
        FoldConstantsPass(),
        # Equal constants first, so that equal nodes have equal inputs.
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        ApplySignaturePass(signature),
        # Last: names for what is left.
        NameNodesPass(),
    )
    removed = {}
    for step in pipeline:
        before = len(converted.model.graph)
        step(converted.model)
        removed[type(step).__name__] = before - len(converted.model.graph)
    return removed
