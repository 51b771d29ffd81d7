"""Everything that a bundle holds, written while the converter's process is at work."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from peft_deploy.atomic_folder import disk_errors
from peft_deploy.bundle import (
    MODEL,
    MODEL_DATA,
    PARAMS,
    PROGRAM,
    BundleFolder,
    Manifest,
    genai_config,
    special_token_ids,
)
from peft_deploy.config.export import ONNX, ExportOptions
from peft_deploy.config.json_file import read_object
from peft_deploy.convert import ConversionJob
from peft_deploy.environment import uncollected
from peft_deploy.errors import CheckpointError
from peft_deploy.signature import LOGITS
from peft_deploy.text import Tokenizer
from peft_deploy.text.tokenizer import TOKENIZER
from peft_deploy.text.wordpiece import VOCABULARY, wordpiece_json
from peft_deploy.weights import RoundingLoss
from peft_deploy.weights.rounding import describe_losses
from peft_deploy.workflows.calibration import calibration_facts, write_calibration
from peft_deploy.workflows.description import describe
from peft_deploy.workflows.graph_parts import GraphPart, encoder_entry
from peft_deploy.workflows.kept_adapters import select_layers, write_kept
from peft_deploy.workflows.phase_clock import PhaseClock
from peft_deploy.workflows.prefixes import write_prefixes
from peft_deploy.workflows.sources import EXPORT_DTYPE, ExportSource
from peft_deploy.workflows.storage import written_parts

if TYPE_CHECKING:
    from peft_deploy.convert import ConvertedGraph, StaticProgram, WeightFile


def fill_bundle(
    folder: BundleFolder,
    source: ExportSource,
    job: ConversionJob,
    options: ExportOptions,
    clock: PhaseClock,
) -> Manifest:
    """Writes everything that a bundle has, the unvalidated manifest last.

    Args:
        folder: to write to.
        source: the model and its adapters.
        job: traces and converts meanwhile.
        options: of the export.
        clock: is told about every phase.
    """
    from peft_deploy.convert import stream_weights

    generation, ends = _read_companions(source)
    losses: dict[str, RoundingLoss] = {}
    precision = options.arithmetic
    parts = written_parts(source, precision, losses, pack=options.packs)
    nbytes = sum(part.nbytes for part in parts)
    folder.require_space(nbytes)
    with ExitStack() as stack:
        files = [
            stack.enter_context(weight_file(folder, options.format, nbytes, part.folder))
            for part in parts
        ]
        for part, file in zip(parts, files, strict=True):
            stream_weights(part.tensors, file, clock)  # while the child traces
        fingerprint = source.fingerprint()
        if options.validate:
            _import_reference(job, clock)
        converted = job.result(clock.phase)
        clock.phase("Finishing the graph")
        source.check(converted.shapes)
        made: Sequence[ConvertedGraph | StaticProgram] = converted.graphs
        with uncollected():
            graphs = [
                _finish(one, source, file, options, part)
                for one, file, part in zip(made, files, parts, strict=True)
            ]
    # Here and not above, for the same reason as below: what it imports would keep the child waiting.
    from peft_deploy.workflows.check_weights import file_facts, written_names

    for facts, part, file in zip(graphs, parts, files, strict=True):
        own = written_names(source, part, options.format)
        facts |= file_facts(folder.path / part.folder, own, options.format, file)
    graph, *others = graphs
    _write_configs(folder, source, generation, ends, options.format)
    graph = write_kept(folder, source, graph, fingerprint)
    signature = source.family.signature(source.config, EXPORT_DTYPE).with_cache_in(precision.dtype)
    if source.importance is not None:
        write_calibration(folder.path, source.importance)
        graph["quantized"]["calibration"] = calibration_facts(source.importance)
    slots = options.prefix_slots
    write_prefixes(folder, source.prefixes, signature, fingerprint, slots=slots)
    names = [file.path.relative_to(folder.path).as_posix() for file in files]
    known = {name: file.sha256 for name, file in zip(names, files, strict=True)}
    hashes = folder.hashes(known)
    shares = {name: loss.relative for name, loss in losses.items()}
    if warning := describe_losses(precision.dtype, shares):
        warnings.warn(warning, stacklevel=3)
    manifest = describe(source, options, converted, hashes, fingerprint, graph, shares)
    if others:
        entry = encoder_entry(source, generation, precision, *others)
        manifest = replace(manifest, encoder=entry)
    folder.seal(manifest)
    return manifest


def _import_reference(job: ConversionJob, clock: PhaseClock) -> None:
    """What the check needs of Paddle: the child is at work on another core, and there is nothing to do here."""
    clock.phase("Importing Paddle")
    job.wait_for_imports()
    for module in ("peft_deploy.base.dygraph", "peft_deploy.parity.reference"):
        importlib.import_module(module)


def weight_file(folder: BundleFolder, format: str, nbytes: int, part: str = "") -> WeightFile:
    """The open file for the weights of a bundle, or of a graph in a folder of its own.

    Args:
        folder: the bundle's.
        format: of the bundle.
        nbytes: of all weights of the bundle, about.
        part: the graph's folder.
    """
    from peft_deploy.convert import ParamsFile, WeightFile

    place = folder.path / part
    with disk_errors(folder.output):
        place.mkdir(exist_ok=True)
    if format == ONNX:
        return WeightFile(place / MODEL_DATA, folder.output, nbytes)
    return ParamsFile(place / PARAMS, folder.output, nbytes)


def _finish(
    converted: ConvertedGraph | StaticProgram,
    source: ExportSource,
    file: WeightFile,
    options: ExportOptions,
    part: GraphPart,
) -> dict[str, Any]:
    """Writes the graph beside its weights; returns what the manifest says of it."""
    from peft_deploy.convert import StaticProgram, write_program

    if isinstance(converted, StaticProgram):
        return {"operators": write_program(converted, file, file.path.with_name(PROGRAM))}
    # Here and not above: onnx-ir takes most of a second to import, which the child has better use for.
    from peft_deploy.workflows.graph import finish_graph

    return finish_graph(
        converted,
        source,
        file,
        options.graph_opset,
        file.path.with_name(MODEL),
        fusion=options.fusion,
        lora_slots=select_layers(source, options) if options.keeps_adapters else None,
        slot_rank=options.slot_rank,
        adapter_bank=options.adapter_bank,
        prefix_slots=options.prefix_slots,
        last_logits=options.last_logits and LOGITS in part.signature.output_names,
        precision=options.arithmetic,
        packed=part.packed,
        same_input=part.same_input,
        signature=part.signature,
    )


def _read_companions(source: ExportSource) -> tuple[dict[str, Any] | None, Sequence[int]]:
    """Generation settings, if any, and the tokenizer's end tokens; damage is to be known before the work.

    Raises:
        CheckpointError: one of the files cannot be read.
    """
    files = {path.name: path for path in source.companions}
    ends: Sequence[int] = ()
    if TOKENIZER in files:
        ends = Tokenizer.from_folder(files[TOKENIZER].parent).eos_ids
    else:
        _missing_tokenizer(source)
    path = files.get("generation_config.json")
    return None if path is None else read_object(path, CheckpointError), ends


def _write_configs(
    folder: BundleFolder,
    source: ExportSource,
    generation: dict[str, Any] | None,
    ends: Sequence[int],
    format: str,
) -> None:
    for file in source.companions:
        folder.copy(file)
    if tokenizer := _missing_tokenizer(source):
        folder.write_text(TOKENIZER, tokenizer)
    config = source.family.huggingface_config(source.config)
    folder.write_text("config.json", _json(config))
    family = source.family
    if family.genai_type is not None and format == ONNX:
        # Not every family calls the size of its vocabulary so.
        sizes = {"vocab_size": family.dims(source.config).vocab_size}
        tokens = special_token_ids({**source.config, **sizes}, generation, ends)
        inputs = family.signature(source.config).input_names
        genai = genai_config(family.genai_type, family.dims(source.config), tokens, inputs)
        folder.write_text("genai_config.json", _json(genai))


def _missing_tokenizer(source: ExportSource) -> str | None:
    """The contents of the ``tokenizer.json`` that only a WordPiece vocabulary stands for; None where it does not."""
    folders = {path.name: path.parent for path in source.companions}
    if TOKENIZER in folders or VOCABULARY not in folders:
        return None
    return wordpiece_json(folders[VOCABULARY])


def _json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"
