"""The graphs that a model is exported as: one, or two for an encoder and a decoder that attends to its text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from peft_deploy.bundle.manifest import ENCODER, EncoderGraph
from peft_deploy.config.export import ExportOptions
from peft_deploy.config.precision import Precision
from peft_deploy.errors import ConfigError
from peft_deploy.families import (
    DecoderFamily,
    EncoderDecoderFamily,
    Family,
    PackedLinear,
    find_packed,
)
from peft_deploy.signature import GraphSignature
from peft_deploy.weights import PackedTensors, SubsetTensors, TensorSource
from peft_deploy.workflows.sources import EXPORT_DTYPE, ExportSource


@dataclass(frozen=True)
class GraphPart:
    """One of a model's graphs.

    Args:
        folder: of the graph and its weights, relative to the bundle's; empty for the bundle's own.
        signature: its inputs and outputs as it is traced, in float32.
        tensors: the weights that it computes with; what both graphs need is in both files.
        same_input: linear layers that read the same input.
        packed: those of them that are one matrix in ``tensors``.
    """

    folder: str
    signature: GraphSignature
    tensors: TensorSource
    same_input: tuple[PackedLinear, ...] = ()
    packed: tuple[PackedLinear, ...] = ()

    @property
    def nbytes(self) -> int:
        """Size of its weights."""
        return sum(self.tensors.info(name).nbytes for name in self.tensors.names())


def graph_parts(
    source: ExportSource, tensors: TensorSource, *, pack: bool = False
) -> list[GraphPart]:
    """The graphs of a model, the one that writes tokens or answers first.

    Args:
        source: the model.
        tensors: all weights of the bundle.
        pack: make linear layers that read the same input one matrix.
    """
    rules = source.family.pack_rules(source.config)
    # By names alone: the weights are written before the graph is known.
    parts = [
        replace(part, same_input=tuple(find_packed(rules, part.tensors.names())))
        for part in _parts(source, tensors)
    ]
    return [_packed(part) for part in parts] if pack else parts


def _packed(part: GraphPart) -> GraphPart:
    tensors = {name: own for group in part.same_input for name, own in group.tensors.items()}
    return replace(part, tensors=PackedTensors(part.tensors, tensors), packed=part.same_input)


def _parts(source: ExportSource, tensors: TensorSource) -> list[GraphPart]:
    family, config = source.family, source.config
    signature = family.signature(config, EXPORT_DTYPE)
    if not isinstance(family, EncoderDecoderFamily):
        return [GraphPart("", signature, tensors)]
    names = tensors.names()
    decoder = SubsetTensors(tensors, {n for n in names if not family.decoder_uses(n)})
    encoder = SubsetTensors(tensors, {n for n in names if not family.encoder_uses(n)})
    return [
        GraphPart("", signature, decoder),
        GraphPart(ENCODER, family.encoder_signature(config, EXPORT_DTYPE), encoder),
    ]


def encoder_entry(
    source: ExportSource,
    generation: Mapping[str, Any] | None,
    precision: Precision,
    graph: dict[str, Any],
) -> EncoderGraph | None:
    """What the manifest says of the encoder's graph; None for a model of one graph.

    Args:
        source: the model.
        generation: generation_config.json, if there is one.
        precision: of the bundle.
        graph: facts about the encoder's graph.

    Raises:
        ConfigError: the token that texts begin with is not in the vocabulary.
    """
    family = source.family
    if not isinstance(family, EncoderDecoderFamily):
        return None
    given = {key: value for key, value in (generation or {}).items() if value is not None}
    start, size = (
        family.start_token({**source.config, **given}),
        family.dims(source.config).vocab_size,
    )
    if not 0 <= start < size:
        raise ConfigError(
            f"texts would begin with token {start} (decoder_start_token_id); the model's are 0 to {size - 1}",
            hint="correct generation_config.json or config.json",
        )
    traced = family.encoder_signature(source.config, EXPORT_DTYPE)
    signature = traced.with_cache_in(precision.dtype)
    return EncoderGraph(signature=signature, start_token_id=start, graph=graph)


def check_possible(family: Family, options: ExportOptions) -> None:
    """Passes unless options ask for what a family's graphs cannot be.

    Raises:
        ConfigError: adapters are to stay apart from the weights of a model of two graphs, or only the last token's
            logits are wanted of one that writes no text.
    """
    if options.last_logits and not isinstance(family, DecoderFamily | EncoderDecoderFamily):
        raise ConfigError(
            f"a {family.model_type} model writes no text, so it has no last token whose logits are all that counts",
            hint="leave --last-logits out",
        )
    if isinstance(family, EncoderDecoderFamily) and (
        options.keeps_adapters or options.prefix_slots
    ):
        raise ConfigError(
            f"a {family.model_type} model is exported as two graphs, which an adapter file cannot fill together",
            hint="export it merged: --merge",
        )
