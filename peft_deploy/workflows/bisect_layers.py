"""Where a bundle that is larger than memory goes wrong: the reference is computed layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from peft_deploy.base import BaseModel
from peft_deploy.bundle import Manifest
from peft_deploy.config.precision import PRECISIONS
from peft_deploy.errors import ExecutionError, ParityError
from peft_deploy.parity.bisect import LayeredReference, Stack, locate
from peft_deploy.parity.cases import Case, CaseMatrix, groups
from peft_deploy.parity.measurement import measure_reference
from peft_deploy.parity.report import ParityReport
from peft_deploy.progress import Progress, Silent
from peft_deploy.workflows.bisect import NOTHING, by_size, failed_cases, with_wrong_weights
from peft_deploy.workflows.check_extras import CheckExtras
from peft_deploy.workflows.rounded_reference import load_stored
from peft_deploy.workflows.shortened_source import shorten_source
from peft_deploy.workflows.sources import ExportSource

if TYPE_CHECKING:
    from peft_deploy.parity.reference import PaddleReference


def searched_in_layers(
    report: ParityReport,
    folder: Path,
    source: ExportSource,
    base: BaseModel,
    extras: CheckExtras,
    *,
    progress: Progress | None = None,
) -> ParityReport:
    """The report of a check of some layers, with the first value in the whole graph that is not PaddleNLP's.

    At most one layer of the reference is in memory, beside what is around the layers, in float32 and perhaps once
    more in float64. The graph's weights stay in their file.

    Args:
        report: of the check, and of the comparison of all weights.
        folder: the bundle, in ONNX format.
        source: what it was made of, read from folders.
        base: the base model in it.
        extras: of the check; says whether to search and has the cases.
        progress: gets a phase for every pass through the layers.

    Returns:
        The report; with a warning when all values that can be compared are right.

    Raises:
        ExecutionError: the graph does not run, or PaddleNLP's layers cannot be computed one by one.
        OutputError: the folder cannot be written.
    """
    if extras.bisect is None or report.passed_alone:
        return report
    manifest = Manifest.read(folder)
    reference = layered_reference(source, base, manifest.precision, progress or Silent())
    names = source.family.names(source.config)
    dtype = PRECISIONS[manifest.precision].dtype
    for case in _cases(report, extras.recordings[-1].expectation.matrix):
        matrix = CaseMatrix(tuple(dict.fromkeys(case.texts)), (case,))
        try:
            expectation = measure_reference(reference, matrix, dtype=dtype, progress=Silent())
        except ParityError:
            continue  # the reference disagrees with itself: no measure there
        found = locate(folder, reference, expectation, [case], names, dtype)
        if found is not None:
            return with_wrong_weights(report, folder, found, source, extras.bisect)
    return replace(report, warnings=[*report.warnings, NOTHING])


def _cases(report: ParityReport, matrix: CaseMatrix) -> Iterator[Case]:
    """Those that failed with some of the layers; where none did, the fault is in others: the simplest of each kind."""
    failed = failed_cases(report, matrix)
    if failed:
        yield from failed
        return
    kinds = [min(cases, key=by_size) for cases in groups(matrix.cases).values()]
    yield from sorted(kinds, key=by_size)


def layered_reference(
    source: ExportSource, base: BaseModel, precision: str, progress: Progress
) -> LayeredReference:
    """The reference of which one layer is in memory at a time.

    Args:
        source: what a bundle was made of, read from folders.
        base: the base model in it.
        precision: of the bundle.
        progress: gets a phase for every pass through the layers.

    Raises:
        ExecutionError: the model has layers in several places.
    """

    def load(index: int) -> PaddleReference:
        from peft_deploy.parity.reference import PaddleReference

        one = shorten_source(source, base, [index])
        return PaddleReference(load_stored(one, precision, Silent()), one.family, one.config)

    family, config = source.family, source.config
    stack = Stack(family.dims(config).num_layers, _path_of_layers(source))
    return LayeredReference(
        load, stack, lambda dtype: family.whole_signature(config, dtype), progress
    )


def _path_of_layers(source: ExportSource) -> str:
    """Where PaddleNLP's model has its layers.

    Raises:
        ExecutionError: in several places.
    """
    rules = source.family.names(source.config).rules
    paths = {rule.paddle.partition("{i}")[0] for rule in rules if "{i}" in rule.paddle}
    if len(paths) != 1:
        raise ExecutionError(
            f"the model has layers in {len(paths)} places, and cannot be computed layer by layer"
        )
    return paths.pop()
