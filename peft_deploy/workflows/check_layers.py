"""The check of a model that is larger than memory: some of its layers, put together to a smaller model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from peft_deploy.base import BaseModel
from peft_deploy.bundle import Manifest
from peft_deploy.config.export import ALL_LAYERS, ONNX
from peft_deploy.config.precision import PRECISIONS
from peft_deploy.environment import available_memory
from peft_deploy.errors import ConfigError, listed
from peft_deploy.families import EncoderDecoderFamily
from peft_deploy.parity.case_result import CaseResult
from peft_deploy.parity.report import CheckedLayers, ParityReport
from peft_deploy.parity.shortened import LayeredGraph, sample_layers
from peft_deploy.progress import Progress, Silent
from peft_deploy.runtime import OnnxRunner
from peft_deploy.signature import GraphSignature, past_names, present_names
from peft_deploy.weights import TensorSource
from peft_deploy.workflows.check_bundle import check_bundle
from peft_deploy.workflows.check_extras import CheckExtras
from peft_deploy.workflows.rounded_reference import load_stored
from peft_deploy.workflows.shortened_source import shorten_source
from peft_deploy.workflows.sources import MEMORY, ExportSource

CASE = "structure of the layers"  # in a report
_LEAST, _MOST = 2, 4  # layers that are checked when nobody says how many
_SIDES = (
    2  # that hold the model in float32: Paddle, and onnxruntime with what it makes of the weights
)
_FLOAT32 = 4
_BESIDES = 2 << 30  # what both sides take for themselves, and for what they compute


def plan_layers(asked: int | str | None, source: ExportSource, manifest: Manifest) -> int | None:
    """How many layers a check looks at; None for the whole model.

    Args:
        asked: a number, ``"all"``, or None: as many as fit into memory where the whole model does not, with a
            warning that says so.
        source: the model.
        manifest: of its bundle.

    Raises:
        ConfigError: a number was given, and the bundle cannot be taken apart.
    """
    whole = asked == ALL_LAYERS
    reason = _inseparable(source, manifest)
    if isinstance(asked, int):
        if reason is not None:
            raise ConfigError(
                f"--validate-layers {asked} is not possible: {reason}",
                hint="leave it out to check the whole model",
            )
        return asked
    free = available_memory()
    if whole or reason is not None or free is None:
        return None
    total, fixed = _sizes(source)
    if total * _SIDES + _BESIDES <= free:
        return None
    layers = source.family.dims(source.config).num_layers
    each = (total - fixed) / layers
    count = int((free - _BESIDES - fixed * _SIDES) / (each * _SIDES))
    count = min(max(_LEAST, min(count, _MOST)), layers)
    warnings.warn(
        f"checking the whole model takes {(total * _SIDES + _BESIDES) / 1e9:.0f} GB of memory, and "
        f"{free / 1e9:.0f} GB are free: {count} of its {layers} layers are computed, and the others compared with "
        f"them; --validate-layers says how many, --validate-layers {ALL_LAYERS} checks all at once",
        stacklevel=3,
    )
    return count


def check_layers(
    folder: Path,
    source: ExportSource,
    base: BaseModel,
    count: int,
    *,
    provider: str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
    extras: CheckExtras | None = None,
) -> ParityReport:
    """Checks some layers of a bundle as if the model had no others.

    Args:
        folder: the bundle, sealed.
        source: what it was made of, read from folders.
        base: the base model in it.
        count: how many layers; the first and the last are always among them.
        provider: what runs the bundle.
        seed: of the random tokens, and of which layers are taken; 0 takes layers that lie evenly.
        progress: is told about every phase.
        extras: what the check covers beyond its usual cases.

    Raises:
        ExecutionError: the graph does not consist of layers that are alike.
        UnsupportedModelError: the configuration does not say where others do how many layers there are.
    """
    progress, manifest = progress or Silent(), Manifest.read(folder)
    total = source.family.dims(source.config).num_layers
    layers = sample_layers(total, count, seed)
    progress.phase(f"Taking {len(layers)} of {total} layers")
    graph = LayeredGraph(folder, total)
    structure = _structure(graph.unlike(), total)
    content = graph.shorten(layers)
    del graph
    short = shorten_source(source, base, layers)
    model = load_stored(short, manifest.precision, progress)
    signature = _shorten_signature(manifest.signature, total, len(layers))
    # The kernels of quantized weights would make whole matrices of them again, if they could not arrange them.
    lean = not PRECISIONS[manifest.precision].quantized
    runner = OnnxRunner(folder, signature, provider=provider, graph=content, lean=lean)
    report = check_bundle(
        folder,
        model,
        short.family,
        short.config,
        runner=runner,
        provider=provider,
        seed=seed,
        progress=progress,
        extras=extras,
    )
    notes = list(report.warnings)
    if apart := [*(n.name for n in source.kept), *(p.name for p in source.prefixes)]:
        notes.append(
            f"only layers were checked, and without what is kept apart from them: {', '.join(apart)}"
        )
    return replace(
        report,
        cases=(*report.cases, structure),
        warnings=notes,
        layers=CheckedLayers(layers, total),
    )


def _inseparable(source: ExportSource, manifest: Manifest) -> str | None:
    """Why a bundle's layers cannot be checked one by one; None when they can."""
    if manifest.format != ONNX:
        return (
            f"the bundle is in the format {manifest.format}, and only ONNX graphs are taken apart"
        )
    if isinstance(source.family, EncoderDecoderFamily):
        return "the bundle has two graphs"
    if source.layout == MEMORY:
        return "the model is in memory already"
    return None


def _sizes(source: ExportSource) -> tuple[int, int]:
    """Bytes of the model in float32, and of what in it is no layer."""
    tensors: TensorSource = source.tensors
    names = source.family.names(source.config)
    whole = {rule.paddle for rule in names.rules if "{i}" not in rule.paddle}
    sizes: Mapping[str, int] = {
        name: _FLOAT32 * _elements(tensors.info(name).shape) for name in tensors.names()
    }
    return sum(sizes.values()), sum(size for name, size in sizes.items() if name in whole)


def _elements(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def _structure(unlike: Mapping[int, str], total: int) -> CaseResult:
    problem = None
    if unlike:
        lines = listed(f"layer {layer}: {text}" for layer, text in unlike.items())
        problem = f"{len(unlike)} of {total} layers are not like the last one:\n{lines}"
    return CaseResult(CASE, CASE, f"{total} layers, node by node", problem=problem)


def _shorten_signature(signature: GraphSignature, total: int, count: int) -> GraphSignature:
    """The signature of the same graph with fewer layers; all layers' caches are of one shape."""
    gone = {*past_names(total), *present_names(total)} - {
        *past_names(count),
        *present_names(count),
    }
    return GraphSignature(
        tuple(spec for spec in signature.inputs if spec.name not in gone),
        tuple(spec for spec in signature.outputs if spec.name not in gone),
    )
