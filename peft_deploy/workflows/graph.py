"""The last steps of a graph on its way into a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from peft_deploy.atomic_folder import disk_errors
from peft_deploy.config.export import FUSED_ORT, OPSETS, PLAIN
from peft_deploy.config.precision import FP32, PRECISIONS, Precision
from peft_deploy.convert import (
    ConvertedGraph,
    WeightFile,
    bind_weights,
    check_graph,
    run_pipeline,
)
from peft_deploy.convert.adapter_bank import AddAdapterBankPass
from peft_deploy.convert.last_logits import LastLogitsPass
from peft_deploy.convert.linears import Selection
from peft_deploy.convert.lora_slots import AddLoraSlotsPass
from peft_deploy.convert.opset import CONTRIB
from peft_deploy.convert.pack_linears import PackLinearsPass
from peft_deploy.convert.packed_names import graph_modules, graph_parameters
from peft_deploy.convert.precision import HalfPrecisionPass, ReadQuantizedPass
from peft_deploy.convert.prefix_slots import AddPrefixSlotsPass, slot_specs
from peft_deploy.convert.weight_file import add_tables
from peft_deploy.families import NameMap, PackedLinear
from peft_deploy.signature import GraphSignature
from peft_deploy.workflows.sources import EXPORT_DTYPE, ExportSource


def finish_graph(
    converted: ConvertedGraph,
    source: ExportSource,
    file: WeightFile,
    opset: int,
    path: Path,
    *,
    fusion: str = PLAIN,
    packed: Sequence[PackedLinear] = (),
    same_input: Sequence[PackedLinear] = (),
    lora_slots: Selection | None = None,
    slot_rank: int | None = None,
    adapter_bank: int | None = None,
    prefix_slots: bool = False,
    last_logits: bool = False,
    precision: Precision = PRECISIONS[FP32],
    signature: GraphSignature | None = None,
) -> dict[str, Any]:
    """Cleans a graph up, joins it with its weights, checks it and writes it.

    Args:
        converted: the graph as it came from the converter.
        source: the model that it was made of.
        file: holds the model's weights; gets the stand-in's tables.
        opset: what was asked for.
        path: where the graph goes, beside the file.
        fusion: how far operators are put together, one of :data:`~peft_deploy.config.export.FUSE_LEVELS`.
        packed: linear layers that the file holds as one matrix.
        same_input: those that read the same input, packed or not: their slots share an A.
        lora_slots: which linear layers get slots for LoRA, if any are to have them.
        slot_rank: rank of those slots; None leaves it open.
        adapter_bank: how many adapters these slots are to hold at once, each row of a batch naming its own; None
            for slots of one adapter at a time.
        prefix_slots: add slots for a prefix.
        last_logits: compute the logits of the last token only.
        precision: of the bundle.
        signature: of the graph as it was traced, in float32; the family's usual one when None.

    Returns:
        What the manifest says of it: ``operators``, how often each appears, ``removed``, how many nodes each
        pass took away, ``fused``, how often each fusion found its pattern, and what stayed plain
        (see :class:`~peft_deploy.convert.fusions.report.FusionReport`), and where there are any, ``packed``, the
        layers in each packed one, ``precision``
        (see :class:`~peft_deploy.convert.precision.half.HalfPrecision`), ``lora_slots``
        (see :class:`~peft_deploy.convert.lora_slots.LoraSlots`), ``adapter_bank``, its ``capacity``, and
        ``prefix_slots``, their names.

    Raises:
        ConversionError: the graph is not what it should be.
    """
    signature = signature or source.family.signature(source.config, EXPORT_DTYPE)
    names = source.family.names(source.config)
    removed = run_pipeline(converted, signature, names)
    signature = signature.with_cache_in(precision.dtype)
    if last_logits:
        LastLogitsPass(signature)(converted.model)
        signature = signature.with_last_logits()
    PackLinearsPass(packed, converted)(converted.model)
    add_tables(converted.constants, file)
    own = graph_parameters(packed, names)
    bind_weights(converted, file, lambda name: own.get(name) or _initializer(names, name))
    fused, opset = _fuse(converted, fusion, opset)
    facts: dict[str, Any] = {"removed": removed, **fused}
    if packed:
        facts["packed"] = graph_modules(packed, names)
    slots: list[str] = []
    if lora_slots is not None:
        groups = graph_modules(same_input, names)
        adding = (
            AddLoraSlotsPass(lora_slots, file, slot_rank, groups)
            if adapter_bank is None
            else AddAdapterBankPass(lora_slots, groups)
        )
        adding(converted.model)
        assert adding.added is not None  # the pass has run
        facts["lora_slots"] = adding.added.to_dict()
        slots += adding.added.names
    if adapter_bank is not None:
        facts["adapter_bank"] = {"capacity": adapter_bank}
        signature = signature.with_adapter_ids()
    if prefix_slots:
        AddPrefixSlotsPass(signature)(converted.model)
        facts["prefix_slots"] = [spec.name for spec in slot_specs(signature)]
        slots += facts["prefix_slots"]
    if precision.dtype != EXPORT_DTYPE:
        half = HalfPrecisionPass(precision.dtype, signature)
        half(converted.model)
        assert half.done is not None  # the pass has run
        facts["precision"] = half.done.to_dict()
    if precision.quantized:
        reading = ReadQuantizedPass(file)
        reading(converted.model)
        assert reading.done is not None  # the pass has run
        facts["quantized"] = reading.done.to_dict()
    facts["operators"] = check_graph(
        converted.model, signature, opset, slots, domains=_domains(fusion, precision)
    )
    with disk_errors(file.output):
        ir.save(converted.model, path)
    return facts


def finish_layer_graph(
    converted: ConvertedGraph,
    signature: GraphSignature,
    file: WeightFile,
    opset: int,
    path: Path,
    fusion: str = PLAIN,
) -> dict[str, Any]:
    """The same for a layer that no family knows, whose weights keep their own names.

    Args:
        converted: the graph as it came from the converter.
        signature: of the graph.
        file: holds the weights that it uses.
        opset: what was asked for.
        path: where the graph goes, beside the file.
        fusion: how far operators are put together.

    Raises:
        ConversionError: the graph is not what it should be.
    """
    removed = run_pipeline(converted, signature, NameMap([]))
    bind_weights(converted, file, lambda parameter: parameter)
    fused, opset = _fuse(converted, fusion, opset)
    counts = check_graph(converted.model, signature, opset, domains=_domains(fusion))
    facts = {"removed": removed, **fused, "operators": counts}
    with disk_errors(file.output):
        ir.save(converted.model, path)
    return facts


def _fuse(converted: ConvertedGraph, fusion: str, opset: int) -> tuple[dict[str, Any], int]:
    """What the manifest says of the fusions, and the operator set that the graph is then to have."""
    if fusion == PLAIN:
        return {}, opset
    # Here and not above: it needs onnxscript, which plain graphs do not.
    from peft_deploy.convert.fusions import run_fusions

    report = run_fusions(converted.model, fusion)
    return report.to_dict(), min(opset, OPSETS.stop - 1) if report.refused else opset


def _domains(fusion: str, precision: Precision = PRECISIONS[FP32]) -> tuple[str, ...]:
    return (CONTRIB,) if fusion == FUSED_ORT or precision.quantized else ()


def _initializer(names: NameMap, parameter: str) -> str:
    """Weights go by Hugging Face's names, which the tools around ONNX know; their layout is [in, out]."""
    mapped = names.to_huggingface(parameter)
    return mapped.name if mapped else parameter
