"""How the weights of a bundle are kept, by the precision that was asked for."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import replace

from peft_deploy.config.precision import Precision
from peft_deploy.errors import ConfigError
from peft_deploy.weights import (
    DecodedTensors,
    EncodedTensors,
    RoundingLoss,
    StoragePlan,
    TensorSource,
)
from peft_deploy.workflows.graph_parts import GraphPart, graph_parts
from peft_deploy.workflows.sources import ExportSource


def storage_plan(source: ExportSource, precision: Precision) -> StoragePlan:
    """Which parameters are kept as something else than their numbers, and as what.

    Names are those of the model's own parameters, in PaddleNLP's scheme.

    Args:
        source: the model.
        precision: of the bundle.
    """
    return {}


def written_parts(
    source: ExportSource,
    precision: Precision,
    losses: MutableMapping[str, RoundingLoss] | None = None,
    *,
    pack: bool = False,
) -> list[GraphPart]:
    """The graphs of a model with the very tensors that their files get.

    An export writes them, and a check compares a bundle's files with them.

    Args:
        source: the model.
        precision: of the bundle.
        losses: gets what rounding loses of every change, once its parameter is read.
        pack: make linear layers that read the same input one matrix.
    """
    plan = storage_plan(source, precision)
    parts = graph_parts(source, source.merged(precision.dtype, losses), pack=pack)
    return [replace(part, tensors=encoded(part, plan)) for part in parts]


def encoded(part: GraphPart, plan: StoragePlan) -> TensorSource:
    """What the file of one graph gets.

    Raises:
        ConfigError: layers that are one matrix are to be kept in several ways.
    """
    return EncodedTensors(part.tensors, {**plan, **_of_packed(part, plan)})


def _of_packed(part: GraphPart, plan: StoragePlan) -> StoragePlan:
    """How packed tensors are kept: as each of their parts is."""
    found = {}
    for name, own in (item for group in part.packed for item in group.tensors.items()):
        storages = [plan.get(parameter) for parameter in own]
        if any(storage != storages[0] for storage in storages):
            raise ConfigError(
                f"{', '.join(own)} are one matrix in the graph, and are to be kept in several ways",
                hint="--fuse none keeps them apart",
            )
        if storages[0] is not None:
            found[name] = storages[0]
    return found


def decoded(source: ExportSource, precision: Precision) -> TensorSource:
    """The weights that a bundle computes with, in float32: what a check gives its reference.

    Args:
        source: the model.
        precision: of the bundle.
    """
    tensors = source.merged(precision.dtype)
    return DecodedTensors(tensors, storage_plan(source, precision))
