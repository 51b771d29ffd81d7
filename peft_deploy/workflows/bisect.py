"""Where a bundle that failed its check goes wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from peft_deploy.bundle import Manifest
from peft_deploy.bundle.adapter_bank import bank_capacity
from peft_deploy.config.export import ONNX
from peft_deploy.config.precision import PRECISIONS
from peft_deploy.errors import ConfigError
from peft_deploy.parity.bisect import Activation, Finding, Weight, locate, write_reproduction
from peft_deploy.parity.bisect.exposed import ExposedGraph
from peft_deploy.parity.cases import Case, CaseMatrix
from peft_deploy.parity.expectation import Expectation
from peft_deploy.parity.report import ParityReport
from peft_deploy.progress import Progress, Silent
from peft_deploy.weights import Array
from peft_deploy.weights.block_quantized import QUANTIZED, SCALES, TABLE
from peft_deploy.workflows.check_extras import CheckExtras
from peft_deploy.workflows.check_weights import PACKED, names_in_bundle, parts_of
from peft_deploy.workflows.sources import ExportSource

if TYPE_CHECKING:
    from peft_deploy.parity.reference import PaddleReference

NOTHING = "no value inside of the graph was found that is not the Paddle model's"
_SAME = 1e-6  # of the largest magnitude: merged in another order


def can_bisect(folder: Path) -> bool:
    """Whether :func:`check_bisectable` passes for the bundle in a folder."""
    try:
        check_bisectable(Manifest.read(folder))
    except ConfigError:
        return False
    return True


def check_bisectable(manifest: Manifest) -> None:
    """Passes when a bundle can be looked into.

    Raises:
        ConfigError: it is not in ONNX format, of a layer that no family knows, has two graphs, a bank of adapters, or
            the logits of the last token alone.
    """
    if manifest.signature.last_logits:
        raise ConfigError(
            "a bundle with the logits of the last token alone cannot be bisected",
            hint="export the same model without --last-logits",
        )
    if manifest.encoder is not None:
        raise ConfigError("only bundles of one graph can be bisected; this one has two")
    if bank_capacity(manifest.graph) is not None:
        raise ConfigError(
            "a bundle with a bank of adapters cannot be bisected",
            hint="export the same model with --adapters runtime",
        )
    if manifest.format != ONNX or manifest.layer is not None:
        raise ConfigError(
            "only ONNX bundles of a known family can be bisected; this one is "
            + ("of a layer" if manifest.layer is not None else f"in the format {manifest.format}"),
            hint="export the same model with --format onnx" if manifest.layer is None else None,
        )


def searched(
    report: ParityReport,
    folder: Path,
    reference: PaddleReference,
    source: ExportSource,
    extras: CheckExtras | None,
    *,
    active: Activation | None = None,
    progress: Progress | None = None,
) -> ParityReport:
    """The report of a check that was just made, searched where it failed and that was asked for.

    Args:
        report: of the check.
        folder: the bundle, in ONNX format.
        reference: the model that was trained, as the check had it.
        source: what the bundle was made of.
        extras: of the check; says whether to search and has what the reference said.
        active: what is active beside the graph.
        progress: gets a phase.
    """
    if extras is None or extras.bisect is None or report.passed_alone:
        return report
    (progress or Silent()).phase("Looking for the first bad value")
    expectation = extras.recordings[-1].expectation
    return with_finding(report, folder, reference, source, expectation, extras.bisect, active)


def with_finding(
    report: ParityReport,
    folder: Path,
    reference: PaddleReference,
    source: ExportSource,
    expectation: Expectation,
    output: Path,
    active: Activation | None = None,
) -> ParityReport:
    """The report, with the first value in the bundle's graph that is not PaddleNLP's.

    Args:
        report: of the check, which failed.
        folder: the bundle, in ONNX format.
        reference: the model that was trained, as the check has it.
        source: what the bundle was made of.
        expectation: of the same check.
        output: a folder for the part of the graph that is at fault, with inputs, outputs and a script.
        active: what is active beside the graph.

    Returns:
        The report; with a warning when no case failed, or all values that can be compared are right.

    Raises:
        ExecutionError: the graph does not run.
        OutputError: the folder cannot be written.
    """
    names = source.family.names(source.config)
    precision = PRECISIONS[Manifest.read(folder).precision]
    cases = failed_cases(report, expectation.matrix)
    found = locate(folder, reference, expectation, cases, names, precision.dtype, active)
    if found is None:
        return replace(report, warnings=[*report.warnings, NOTHING])
    return with_wrong_weights(report, folder, found, source, output, active)


def with_wrong_weights(
    report: ParityReport,
    folder: Path,
    found: Finding,
    source: ExportSource,
    output: Path,
    active: Activation | None = None,
) -> ParityReport:
    """The report with what was found, and with those of its weights that are wrong; writes the reproduction.

    Args:
        report: of the check.
        folder: the bundle.
        found: what a search found.
        source: what the bundle was made of.
        output: a folder for the reproduction.
        active: what is active beside the graph.

    Raises:
        OutputError: the folder cannot be written.
    """
    wrong = [*_wrong_weights(folder, found, source), *_wrong_blocks(folder, found, source)]
    found = replace(found, weights=[*wrong, *_wrong_files(found, active or Activation())])
    write_reproduction(output, folder, found)
    return replace(report, finding=found)


def failed_cases(report: ParityReport, matrix: CaseMatrix) -> list[Case]:
    """The cases that ran and failed, the simplest first."""
    failed = {case.name for case in report.cases if not case.passed and case.problem is None}
    return sorted((case for case in matrix.cases if case.name in failed), key=by_size)


def by_size(case: Case) -> tuple[int, int, int]:
    """The simplest first: one call without a past, then few tokens but more than one."""
    tokens = case.slots.size
    return len(case.calls), case.given, tokens if case.slots.shape[1] > 1 else 1 << 30


def _wrong_weights(folder: Path, found: Finding, source: ExportSource) -> list[Weight]:
    """Weights of the suspected operators that are not those that an export would write now."""
    graph, manifest = ExposedGraph(folder), Manifest.read(folder)
    packed = manifest.graph.get(PACKED, {})
    names = source.family.names(source.config)
    merged = source.merged(PRECISIONS[manifest.precision].dtype)
    wrong: list[Weight] = []
    known: dict[str, str] = {}
    for parameter in merged.names():
        mapped = names.to_huggingface(parameter)
        known[mapped.name if mapped else parameter] = parameter
    widths = {name: merged.info(parameter).shape[-1:] for name, parameter in known.items()}
    for stored in graph.initializers_of(found.nodes):
        for name, have in _parts(graph, stored, packed, widths):
            if name not in known:
                continue
            want = merged.read(known[name])
            note = _compare(have, want, source.tensors.read(known[name]))
            if note is not None:
                inside = "" if name == stored else f" (columns of {stored})"
                wrong.append(Weight(name, note + inside))
    return wrong


def _wrong_blocks(folder: Path, found: Finding, source: ExportSource) -> list[Weight]:
    """Likewise quantized ones: their numbers, or the scales of those."""
    graph, manifest, wrong = ExposedGraph(folder), Manifest.read(folder), list[Weight]()
    (part,) = parts_of(manifest, source)
    tensors = {name: own for own, name in names_in_bundle(manifest, source, part).items()}
    for stored in graph.initializers_of(found.nodes):
        name = stored.removesuffix(TABLE)
        if not name.endswith((QUANTIZED, SCALES)) or name not in tensors:
            continue
        want = part.tensors.read(tensors[name])
        have = graph.weight(stored).reshape(want.shape)
        blocks = (have != want).reshape(*want.shape[:2], -1).any(-1)  # [out, blocks]
        if blocks.any():
            first = [int(i) for i in np.argwhere(blocks)[0]]
            note = f"{blocks.sum()} of {blocks.size} blocks are others; the first is {first}"
            wrong.append(Weight(stored, note))
    return wrong


def _parts(
    graph: ExposedGraph,
    stored: str,
    packed: Mapping[str, Sequence[str]],
    widths: Mapping[str, tuple[int, ...]],
) -> Iterator[tuple[str, Array]]:
    """An initializer by its name; of a packed layer, the columns of each layer in it by that one's."""
    module, _, kind = stored.rpartition(".")
    if any(f"{part}.{kind}" not in widths for part in packed.get(module, ("",))):
        yield stored, graph.weight(stored)
        return
    array, begin = graph.weight(stored), 0
    for part in packed[module]:
        name = f"{part}.{kind}"
        end = begin + sum(widths[name])
        yield name, array[..., begin:end]
        begin = end


def _wrong_files(found: Finding, active: Activation) -> list[Weight]:
    """What the suspected operators take from a file beside the graph that is not what an export would write."""
    wrong: list[Weight] = []
    for name, want in active.wanted.items():
        if name not in found.inputs:
            continue
        have = active.given.get(name)
        note = "it is missing" if have is None else _compare(have, want)
        if note is not None:
            wrong.append(Weight(name, note))
    return wrong


def _compare(have: Array, want: Array, base: Array | None = None) -> str | None:
    """What is wrong with a weight; None when nothing is."""
    if have.shape != want.shape:
        return f"it is {list(have.shape)}; it should be {list(want.shape)}"
    scale = float(np.abs(want).max())
    off = float(np.abs(have.astype(np.float64) - want.astype(np.float64)).max())
    if off <= _SAME * scale:
        return None
    if base is not None and np.array_equal(have, base.astype(have.dtype)):
        return "it is the base model's, without the adapter"
    if have.ndim == 2 and have.shape[0] == have.shape[1] and np.array_equal(have, want.T):
        return "it is transposed"
    return f"it is off by up to {off:.3g}, where the values reach {scale:.3g}"
