"""How the weights of a bundle are kept, by the precision that was asked for."""

from __future__ import annotations

from peft_deploy.config.precision import Precision
from peft_deploy.weights import DecodedTensors, EncodedTensors, StoragePlan, TensorSource
from peft_deploy.workflows.graph_parts import GraphPart
from peft_deploy.workflows.sources import ExportSource


def storage_plan(source: ExportSource, precision: Precision) -> StoragePlan:
    """Which parameters are kept as something else than their numbers, and as what.

    Names are those of the model's own parameters, in PaddleNLP's scheme.

    Args:
        source: the model.
        precision: of the bundle.
    """
    return {}


def encoded(part: GraphPart, plan: StoragePlan) -> TensorSource:
    """What the file of one graph gets."""
    return EncodedTensors(part.tensors, plan)


def decoded(source: ExportSource, precision: Precision) -> TensorSource:
    """The weights that a bundle computes with, in float32: what a check gives its reference.

    Args:
        source: the model.
        precision: of the bundle.
    """
    tensors = source.merged(precision.dtype)
    return DecodedTensors(tensors, storage_plan(source, precision))
