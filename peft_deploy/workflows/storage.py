"""How the weights of a bundle are kept, by the precision that was asked for."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import replace

from peft_deploy.config.precision import CALIBRATED_BITS, Precision
from peft_deploy.errors import ConfigError
from peft_deploy.weights import (
    BlockQuantized,
    DecodedTensors,
    EncodedTensors,
    RoundingLoss,
    Storage,
    StoragePlan,
    TensorSource,
)
from peft_deploy.weights.block_quantized import BLOCK
from peft_deploy.workflows.graph_parts import GraphPart, graph_parts
from peft_deploy.workflows.sources import ExportSource


def storage_plan(source: ExportSource, precision: Precision) -> StoragePlan:
    """Which parameters are kept as something else than their numbers, and as what.

    Names are those of the model's own parameters, in PaddleNLP's scheme.

    Args:
        source: the model.
        precision: of the bundle.
    """
    if not precision.quantized:
        return {}
    names, plan = source.family.names(source.config), dict[str, Storage]()
    heads = _shared_with_head(source)
    squares = {} if source.importance is None else source.importance.squares
    for parameter in source.tensors.names():
        info, mapped = source.tensors.info(parameter), names.to_huggingface(parameter)
        if len(info.shape) != 2:
            continue
        inside = any(part.isdigit() for part in parameter.split("."))
        bits = precision.bits if inside else precision.head_bits
        if parameter in heads and bits is not None and info.shape[1] % BLOCK == 0:
            # Looked up and multiplied by, so that a block must not reach over the end of a row.
            plan[parameter] = BlockQuantized(bits, rows=True)
        elif mapped is not None and mapped.is_linear and parameter not in heads and bits:
            weighted = squares.get(parameter) if bits == CALIBRATED_BITS else None
            plan[parameter] = BlockQuantized(bits, importance=weighted)
    return plan


def _shared_with_head(source: ExportSource) -> frozenset[str]:
    """The tables of embeddings whose transpose a head multiplies by."""
    names, tied = source.family.names(source.config), source.family.tied(source.config)
    linear = {name for name in tied if (mapped := names.to_huggingface(name)) and mapped.is_linear}
    return frozenset(tied[name] for name in linear)


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
