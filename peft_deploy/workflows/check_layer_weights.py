"""Checks the weights in the files of a bundle of a layer that no family knows. Needs Paddle."""

from __future__ import annotations

from pathlib import Path

from peft_deploy.bundle import Manifest
from peft_deploy.parity.report import ParityReport
from peft_deploy.progress import Progress
from peft_deploy.trace.layer import weights_of
from peft_deploy.workflows.check_weights import (
    RENAMED,
    TABLES,
    stored_tensors,
    with_weights,
    wrong_tables,
    wrong_weights,
)
from peft_deploy.workflows.layer_source import LayerSource, LayerTensors


def check_layer_weights(
    report: ParityReport, folder: Path, source: LayerSource, *, progress: Progress
) -> ParityReport:
    """The report with one more case: every weight that the graph has is the layer's, byte by byte.

    What is stored and is no weight of the layer's, such as a constant of its forward, is held to the hash that the
    export kept.

    Args:
        report: of the other cases.
        folder: the bundle, sealed.
        source: the layer, its adapter active.
        progress: gets a phase counted in tensors.
    """
    manifest = Manifest.read(folder)
    stored = stored_tensors(folder, manifest.format)
    origins = {name: name for name in stored} | manifest.graph.get(RENAMED, {})
    known = weights_of(source.inner)
    names = [(tensor, name) for name, tensor in origins.items() if tensor in known]
    progress.phase("Comparing the weights", len(names), "tensors")
    tensors = LayerTensors(source, [tensor for tensor, _ in names], merged=True)
    adapter = source.adapter
    summed = frozenset() if adapter is None else frozenset(f"{m}.weight" for m in adapter.pairs)
    wrong = wrong_weights(stored, tensors, names, summed, progress)
    tables = manifest.graph.get(TABLES)
    if tables is not None:  # bundles of earlier releases have none
        wrong |= wrong_tables(stored, tables)
        strange = {n for n, tensor in stored.items() if tensor.content is None}
        strange -= {*(name for _, name in names), *tables}
        wrong |= dict.fromkeys(sorted(strange), "the layer has no such weight")
    size = sum(tensor.length for tensor in stored.values())
    return with_weights(report, wrong, len(names), size)
