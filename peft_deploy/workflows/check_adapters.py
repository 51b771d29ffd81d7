"""Checks the adapters that a bundle keeps apart from its weights, each against the model with that adapter active."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from peft_deploy.adapters.formats.onnx_file import read_onnx_file
from peft_deploy.bundle import Manifest
from peft_deploy.bundle.adapter_bank import bank_capacity
from peft_deploy.bundle.adapter_files import adapter_path
from peft_deploy.config.export import RUNTIME
from peft_deploy.parity.bisect import Activation
from peft_deploy.parity.case_result import CaseResult
from peft_deploy.parity.report import ParityReport
from peft_deploy.progress import Progress, Silent
from peft_deploy.runtime import Session
from peft_deploy.runtime.exact_arithmetic import exact_arithmetic
from peft_deploy.runtime.runner import Array
from peft_deploy.signature import ATTENTION_MASK, INPUT_IDS, POSITION_IDS
from peft_deploy.workflows.bisect import searched
from peft_deploy.workflows.check_extras import CheckExtras
from peft_deploy.workflows.kept_adapters import kept_tensors
from peft_deploy.workflows.rounded_reference import load_stored
from peft_deploy.workflows.sources import ExportSource, Mismatch, NamedAdapter

PART = "adapter {}"  # of a report
_PROBE = 16  # tokens
_ROWS = 8  # at most, in one batch
_ROWS_AGREE = 1e-4  # of an output's size; the order of float32 sums depends on the other rows


@exact_arithmetic()
def check_adapters(
    report: ParityReport,
    folder: Path,
    source: ExportSource,
    *,
    provider: str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
    extras: CheckExtras | None = None,
) -> ParityReport:
    """The report of a bundle without adapters, joined by those with each of them.

    All adapters are used in one session after another, and the graph without adapters has to give the very same
    numbers before and after.

    Args:
        report: of the bundle without adapters.
        folder: the bundle, sealed or not.
        source: what it was made of; its kept adapters are checked, and have to be in the bundle.
        provider: what runs the bundle.
        seed: of the random tokens.
        progress: is told about every phase.
        extras: what the check covers beyond its usual cases.
    """
    if not source.kept:
        return report
    # Here, because of what validate imports in turn.
    from peft_deploy.parity.reference import PaddleReference
    from peft_deploy.workflows.check_bundle import check_bundle

    progress = progress or Silent()
    session = Session(folder, provider=provider)
    vocab_size = source.family.dims(source.config).vocab_size
    before = _probe(session, vocab_size, seed)
    cases = [*report.cases]
    parts: dict[str, ParityReport] = {}
    for named in source.kept:
        progress.phase(f"Preparing the check of {named.name}")
        session.load_adapter(named.name)
        model = load_stored(source, session.manifest.precision, progress, named)
        part = check_bundle(
            folder,
            model,
            source.family,
            source.config,
            runner=session.runner(named.name),
            provider=provider,
            seed=seed,
            progress=progress,
            extras=extras,
        )
        if report.finding is None and not _is_searched(parts.values()):
            reference = PaddleReference(model, source.family, source.config)
            active = _active(folder, named, source, session.manifest)
            part = searched(
                part, folder, reference, source, extras, active=active, progress=progress
            )
        parts[PART.format(named.name)] = part
    if bank_capacity(session.manifest.graph) is not None:
        cases.append(_compare_rows(session, vocab_size, seed))
    cases.append(_compare_off(before, _probe(session, vocab_size, seed)))
    return replace(report, cases=tuple(cases), parts={**report.parts, **parts})


def _is_searched(parts: Iterable[ParityReport]) -> bool:
    return any(part.finding is not None for part in parts)


def _active(
    folder: Path, named: NamedAdapter, source: ExportSource, manifest: Manifest
) -> Activation:
    """The adapter as the bundle has it, and as an export would write it."""
    file = read_onnx_file(adapter_path(folder, named.name))
    wanted = kept_tensors(named.adapter, source, manifest.graph["lora_slots"])
    return Activation(slots=file.tensors, wanted=wanted)


def _probe(
    session: Session, vocab_size: int, seed: int, rows: Sequence[str | None] = (None,)
) -> Mapping[str, Array]:
    """Every output for a few tokens, without an adapter or with one a row."""
    shape = (len(rows), _PROBE)
    given: dict[str, Array] = {
        INPUT_IDS: np.random.default_rng(seed).integers(0, vocab_size, shape),
        ATTENTION_MASK: np.ones(shape, np.int64),
        POSITION_IDS: np.tile(np.arange(_PROBE, dtype=np.int64), (len(rows), 1)),
    }
    signature = session.signature
    cache = {spec.name for spec in signature.past}
    others = np.zeros(shape, np.int64)  # such as an encoder's segments
    names = [name for name in signature.input_names if name not in cache]
    feeds = {name: given.get(name, others) for name in names}
    if len(set(rows)) == 1:
        return session.run(feeds, adapter=rows[0])
    return session.run(feeds, adapters=rows)


def _compare_rows(session: Session, vocab_size: int, seed: int) -> CaseResult:
    """Whether each row of a batch gets what a batch with its adapter alone gets."""
    rows = [*session.adapters[: _ROWS - 1], None]
    mixed = _probe(session, vocab_size, seed, rows)
    problem = None
    for row, name in enumerate(rows):
        alone = _probe(session, vocab_size, seed, [name] * len(rows))
        for output, array in alone.items():
            difference = _relative(mixed[output][row], array[row])
            if not difference <= _ROWS_AGREE:
                problem = (
                    f"{output} of the row with {name or 'no adapter'} differs by {difference:.1g} of its size from "
                    "what a batch with that alone gives"
                )
    group = "an adapter of its own for each row"
    shape = f"batch {len(rows)}, {_PROBE} tokens"
    return CaseResult(group, group, shape, problem=problem)


def _relative(found: Array, expected: Array) -> float:
    wanted = expected.astype(np.float64)
    size = max(float(np.abs(wanted).max(initial=0)), float(np.finfo(np.float32).tiny))
    return float(np.abs(found.astype(np.float64) - wanted).max(initial=0)) / size


def _compare_off(before: Mapping[str, Array], after: Mapping[str, Array]) -> CaseResult:
    changed = [name for name in before if not np.array_equal(before[name], after[name])]
    problem = None
    if changed:
        problem = (
            f"after the adapters were used, {len(changed)} outputs without an adapter are not what they were before, "
            f"{changed[0]} among them"
        )
    group = "adapters off again"
    return CaseResult(group, group, f"batch 1, {_PROBE} tokens", problem=problem)


def adapter_mismatches(manifest: Manifest, source: ExportSource) -> list[Mismatch]:
    """Where the adapters that were given are not among those that a bundle keeps apart from its weights."""
    recorded = {
        entry["name"]: entry["fingerprint"]
        for entry in manifest.adapters
        if entry.get("mode") == RUNTIME
    }
    found: list[Mismatch] = []
    for named in source.kept:
        given = named.adapter.fingerprint
        if named.name not in recorded:
            said = f"the bundle keeps no adapter {named.name}; it has {', '.join(recorded)}"
            found.append((said, "name each as the bundle does: --adapter NAME=DIR"))
        elif recorded[named.name] != given:
            said = (
                f"the bundle's adapter {named.name} has the fingerprint {recorded[named.name][:12]}; the one that was "
                f"given has {given[:12]}"
            )
            found.append((said, "give the very adapter that the bundle was exported with"))
    return found
