"""Any layer in memory as a bundle, by its own forward: the export of models that no family knows. Needs Paddle."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft_deploy.adapters.lora.views import (
    base_forward,
)
from peft_deploy.bundle import MODEL, PROGRAM, BundleFolder, Manifest
from peft_deploy.config.export import ONNX, ExportOptions
from peft_deploy.convert import (
    ConversionJob,
    ConvertedGraph,
    StaticProgram,
    WeightFile,
    stream_weights,
    write_program,
)
from peft_deploy.convert.worker import leave_traced
from peft_deploy.errors import ConversionError
from peft_deploy.parity.gate import CheckOptions
from peft_deploy.parity.layer_cases import LayerCase, draw_cases, name_dimensions
from peft_deploy.parity.layer_check import check_layer
from peft_deploy.parity.layer_reference import LayerReference
from peft_deploy.parity.report import ParityReport
from peft_deploy.progress import Progress
from peft_deploy.runtime import open_runner
from peft_deploy.signature import GraphSignature
from peft_deploy.trace.layer import trace_layer, weights_of
from peft_deploy.trace.program import TracedProgram
from peft_deploy.workflows.check_layer_weights import check_layer_weights
from peft_deploy.workflows.check_weights import file_facts
from peft_deploy.workflows.contents import weight_file
from peft_deploy.workflows.description import describe_layer, unfused_warning
from peft_deploy.workflows.layer_source import LayerSource, LayerTensors
from peft_deploy.workflows.phase_clock import PhaseClock
from peft_deploy.workflows.sources import NamedAdapter


def export_layer(
    folder: BundleFolder, source: LayerSource, options: ExportOptions, clock: PhaseClock
) -> tuple[Manifest, ParityReport | None]:
    """Fills a bundle's folder.

    The layer is traced in this process, because a layer in memory need not be one that another process can build;
    Paddle2ONNX runs in a child as ever.

    Args:
        folder: to fill and seal.
        source: the layer.
        options: of the export.
        clock: is told about every phase.

    Returns:
        The manifest, and the check's report when there was one.

    Raises:
        PeftDeployError: see :mod:`peft_deploy.errors`.
    """
    adapter = source.adapter
    clock.phase("Trying the layer")
    cases = draw_cases(source.signature)
    traced, signature = _trace(source, cases, clock)
    if not traced.parameters and options.format != ONNX:
        raise ConversionError(
            f"{type(source.inner).__name__} computes without any weights, and Paddle loads no program without them",
            hint="use --format onnx",
        )
    tensors = LayerTensors(source, sorted(traced.parameters.values()), merged=True)
    nbytes = sum(tensors.info(name).nbytes for name in tensors.names())
    folder.require_space(nbytes)
    with _job(traced, source, options) as job, weight_file(folder, options.format, nbytes) as file:
        stream_weights(tensors, file, clock)
        converted = job.result(clock.phase)
        clock.phase("Finishing the graph")
        graph = _finish(converted, signature, file, options)
    own = {name: name for name in tensors.names()}
    graph |= file_facts(folder.path, own, options.format, file)
    if warning := unfused_warning(options, graph):
        warnings.warn(warning, stacklevel=4)
    for path in source.companions:
        folder.copy(path)
    manifest = describe_layer(
        names=(source.name or type(source.inner).__name__, type(source.inner).__name__),
        signature=signature,
        layer=source.signature,
        fingerprint=source.base_fingerprint(),
        adapter=None if adapter is None else NamedAdapter(source.adapter_name, adapter),
        options=options,
        converted=converted,
        hashes=folder.hashes({file.path.name: file.sha256}),
        graph=graph,
    )
    folder.seal(manifest)
    if not options.validate:
        return manifest, None
    report = check_bundle_of_layer(folder.path, source, cases=cases, progress=clock)
    manifest = replace(manifest, parity=report.to_dict())
    folder.seal(manifest)
    return manifest, report


def check_bundle_of_layer(
    folder: Path,
    source: LayerSource,
    *,
    cases: Sequence[LayerCase] = (),
    provider: str = "cpu",
    seed: int = 0,
    progress: Progress,
) -> ParityReport:
    """Checks a bundle against the layer that it was made of.

    Args:
        folder: the bundle, sealed.
        source: the layer, its adapter active.
        cases: inputs; drawn from the signature when there are none.
        provider: what runs the bundle.
        seed: of the inputs.
        progress: gets a phase for each side.
    """
    runner = open_runner(folder, provider=provider)
    reference = LayerReference(source.layer, source.signature, runner.signature)
    report = check_layer(
        reference,
        runner,
        cases or draw_cases(source.signature, seed),
        options=CheckOptions(seed=seed, provider=provider),
        progress=progress,
    )
    return check_layer_weights(report, folder, source, progress=progress)


def _trace(
    source: LayerSource, cases: Sequence[LayerCase], clock: PhaseClock
) -> tuple[TracedProgram, GraphSignature]:
    """The program, and its signature with every dimension named; what cannot be called is found before."""
    reference = LayerReference(
        source.layer, source.signature, GraphSignature(source.signature.inputs, ())
    )
    shapes = [{n: a.shape for n, a in reference.run(case.feeds).items()} for case in cases]
    clock.phase("Tracing")
    context = nullcontext() if source.adapted is None else base_forward(source.adapted)
    with context:
        traced = trace_layer(source.inner, source.signature)
    signature = name_dimensions(traced.signature, source.signature, cases, shapes)
    return replace(traced, signature=signature), signature


def _job(
    traced: TracedProgram, source: LayerSource, options: ExportOptions
) -> ConversionJob | nullcontext[_Done]:
    """The child that converts, or what is done already: Paddle's own format needs no child."""
    shapes = {name: tuple(t.shape) for name, t in weights_of(source.inner).items()}
    if options.format == ONNX:
        return ConversionJob(
            {}, options.converted_opset, traced=lambda folder: leave_traced(folder, traced, shapes)
        )
    return nullcontext(_Done(StaticProgram.of(traced.under_own_names(), shapes)))


def _finish(
    converted: ConvertedGraph | StaticProgram,
    signature: GraphSignature,
    file: WeightFile,
    options: ExportOptions,
) -> dict[str, Any]:
    if isinstance(converted, StaticProgram):
        return {"operators": write_program(converted, file, file.path.with_name(PROGRAM))}
    from peft_deploy.workflows.graph import finish_layer_graph

    path = file.path.with_name(MODEL)
    return finish_layer_graph(
        converted, signature, file, options.graph_opset, path, options.fusion
    )


@dataclass(frozen=True)
class _Done:
    program: StaticProgram

    def result(self, _on_phase: Any) -> StaticProgram:
        """The program."""
        return self.program
