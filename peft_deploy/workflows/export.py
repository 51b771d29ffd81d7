"""From a model and an adapter to a bundle on disk."""

from __future__ import annotations

import resource
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_deploy.base import BaseModel, open_base
from peft_deploy.bundle import BundleFolder, Manifest
from peft_deploy.bundle.folder import check_output
from peft_deploy.config.export import ALL_LAYERS, ExportOptions
from peft_deploy.convert import ConversionJob
from peft_deploy.environment import require_paddle
from peft_deploy.errors import ConfigError, ParityError
from peft_deploy.progress import Progress, Silent
from peft_deploy.workflows.calibration import calibrated, read_calibration
from peft_deploy.workflows.check_extras import CheckExtras, plan_extras
from peft_deploy.workflows.contents import fill_bundle
from peft_deploy.workflows.description import plan_lines
from peft_deploy.workflows.graph_parts import check_possible
from peft_deploy.workflows.kept_adapters import check_bank, check_keepable
from peft_deploy.workflows.phase_clock import PhaseClock
from peft_deploy.workflows.prefixes import check_takes_prefixes, is_prefix
from peft_deploy.workflows.sources import (
    Adapters,
    ExportSource,
    from_folders,
    given_adapters,
)

if TYPE_CHECKING:
    from paddle import nn

    from peft_deploy.config.layer_signature import LayerSignature
    from peft_deploy.parity import ParityReport

    Signature = LayerSignature | str | Path | dict[str, Any]


@dataclass(frozen=True)
class ExportResult:
    """What an export did.

    Args:
        output: the bundle's folder; after a dry run, where it would have been.
        manifest: the bundle's manifest; None after a dry run.
        parity: the check's report; None when it was left out.
        seconds: phase → seconds.
        peak_memory: the larger of this process's and its children's peak resident memory, in bytes.
        plan: what would be done, in words; only after a dry run.
    """

    output: Path
    manifest: Manifest | None
    parity: ParityReport | None
    seconds: dict[str, float]
    peak_memory: int
    plan: list[str] = field(default_factory=list)


def export(
    base: str | Path | BaseModel | nn.Layer,
    output: str | Path,
    *,
    adapter: Adapters = None,
    tokenizer: str | Path | None = None,
    signature: Signature | None = None,
    options: ExportOptions | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Makes a bundle.

    Args:
        base: the base model's folder, a name that PaddleNLP can download, or a PaddleNLP model or ``LoRAModel`` in
            memory, which is left as it was.
        output: the bundle's folder.
        adapter: the adapter's folder, or ``NAME=FOLDER``, or several: LoRA and prefixes; not for a model in memory,
            which brings its own. More than one LoRA adapter needs ``ExportOptions(adapters="runtime")``.
        tokenizer: a folder with tokenizer files; for a model in memory.
        signature: inputs and outputs of a model that no family knows: a
            :class:`~peft_deploy.config.layer_signature.LayerSignature`, its JSON form, or a file with that.
            ``base`` can then be any ``paddle.nn.Layer`` or a ``LoRAModel`` around one, or a folder with a model of
            PaddleNLP's; it is exported by its own forward.
        options: how; defaults are those of the command line.
        progress: is told about every phase.

    Raises:
        PeftDeployError: see :mod:`peft_deploy.errors`; the output folder is then as it was before.

    Example:
        >>> import peft_deploy
        >>> peft_deploy.export("base/", "bundle/", adapter="adapter/")  # doctest: +SKIP
    """
    options, clock = options or ExportOptions(), PhaseClock(progress or Silent())
    output = Path(output).expanduser()
    check_output(output, force=options.force)
    if signature is not None:
        manifest, report, plan = _export_layer(
            base, output, adapter, tokenizer, signature, options, clock
        )
        return ExportResult(output, manifest, report, clock.done(), _peak(), plan)
    clock.phase("Reading names and shapes")
    if isinstance(base, str | Path):
        base = open_base(base, options.pooling)
    elif isinstance(base, BaseModel) and options.pooling is not None:
        base = base.pooled(options.pooling)
    _check_combination(base, adapter, options)
    if options.dry_run:
        source = _source(base, adapter, tokenizer, options)
        read_calibration(source, options)  # refuses what cannot be read
        plan = plan_lines(source, options)
        return ExportResult(output, None, None, clock.done(), _peak(), plan)
    with ExitStack() as stack:
        # The child needs the configuration only: it starts before the files are looked into.
        early = isinstance(base, BaseModel)
        if early:
            job = stack.enter_context(
                ConversionJob(base.config, options.converted_opset, options.format)
            )
        source = _source(base, adapter, tokenizer, options)
        if not early:
            job = stack.enter_context(
                ConversionJob(source.config, options.converted_opset, options.format)
            )
        extras = plan_extras(options, source)
        folder = stack.enter_context(BundleFolder(output, force=options.force))
        if text := read_calibration(source, options):
            job.wait_for_imports()  # Paddle is imported next
            source = calibrated(source, text, options.arithmetic, clock)
        manifest = fill_bundle(folder, source, job, options, clock)
        report = None
        if options.validate:
            given = base if isinstance(base, BaseModel) else None
            manifest, report = _validate(folder, source, given, manifest, options, extras, clock)
            _require_passed(report, options)
        folder.commit()
    return ExportResult(output, manifest, report, clock.done(), _peak())


def _require_passed(report: ParityReport, options: ExportOptions) -> None:
    if not report.passed and not options.keep_failed:
        raise ParityError(
            f"the exported model does not compute what was trained: {report.summary()}",
            hint="nothing was left behind; --keep-failed keeps the bundle for a closer look",
            report=report,
        )


def _export_layer(
    base: str | Path | BaseModel | nn.Layer,
    output: Path,
    adapter: Adapters,
    tokenizer: str | Path | None,
    signature: Signature,
    options: ExportOptions,
    clock: PhaseClock,
) -> tuple[Manifest | None, ParityReport | None, list[str]]:
    """A model that no family knows."""
    require_paddle("exporting a model by its own forward")
    from peft_deploy.workflows.export_layer import export_layer
    from peft_deploy.workflows.layer_source import check_layer_options, layer_source, plan_layer

    check_layer_options(options, adapter, base)
    source = layer_source(base, signature, adapter, tokenizer, clock)
    if options.dry_run:
        return None, None, plan_layer(source)
    with BundleFolder(output, force=options.force) as folder:
        manifest, report = export_layer(folder, source, options, clock)
        if report is not None:
            if options.report is not None:
                from peft_deploy.workflows.parity_reports import save_reports

                save_reports(options.report, folder.path, report, name=output.resolve().name)
            _require_passed(report, options)
        folder.commit()
    return manifest, report, []


def _check_combination(
    base: BaseModel | nn.Layer, adapter: Adapters, options: ExportOptions
) -> None:
    given = given_adapters(adapter)
    if given and not isinstance(base, BaseModel):
        raise ConfigError(
            "a model in memory brings its own adapter; give a folder as base to add one"
        )
    placed = options.merge or options.keeps_adapters
    if not placed and any(not is_prefix(text) for text in given):
        raise ConfigError(
            "an adapter was given without saying what to do with it",
            hint="add --merge, or --adapters runtime to keep it apart from the weights",
        )


def _source(
    base: BaseModel | nn.Layer,
    adapter: Adapters,
    tokenizer: str | Path | None,
    options: ExportOptions,
) -> ExportSource:
    keep = options.keeps_adapters
    if isinstance(base, BaseModel):
        source = from_folders(base, adapter, keep=keep)
    else:
        from peft_deploy.workflows.in_memory import from_memory

        folder = None if tokenizer is None else Path(tokenizer)
        source = from_memory(base, folder, keep=keep, pooling=options.pooling)
    check_possible(source.family, options)
    for named in source.kept:
        check_keepable(named.adapter, source, options.slot_rank)
    check_bank(source, options.adapter_bank)
    if options.prefix_slots:
        check_takes_prefixes(source)
    for remark in (*source.family.remarks(source.config), *source.limits_of_check):
        warnings.warn(remark, stacklevel=3)
    return source


def _validate(
    folder: BundleFolder,
    source: ExportSource,
    base: BaseModel | None,
    manifest: Manifest,
    options: ExportOptions,
    extras: CheckExtras,
    clock: PhaseClock,
) -> tuple[Manifest, ParityReport]:
    clock.phase("Preparing the check")
    from peft_deploy.workflows.check_adapters import check_adapters
    from peft_deploy.workflows.check_bundle import check_bundle
    from peft_deploy.workflows.check_layers import check_layers, plan_layers
    from peft_deploy.workflows.check_loss import KnownText, add_loss, read_in_float32
    from peft_deploy.workflows.check_prefixes import check_prefixes
    from peft_deploy.workflows.check_weights import check_weights
    from peft_deploy.workflows.parity_reports import save_reports
    from peft_deploy.workflows.recorded_reference import keep_recordings
    from peft_deploy.workflows.rounded_reference import load_stored

    count = plan_layers(options.validate_layers, source, manifest)
    if base is not None and count is not None:
        if options.record_reference:
            raise ConfigError(
                "--record-reference needs the check of the whole model, which does not fit into memory",
                hint=f"leave it out, or take the risk: --validate-layers {ALL_LAYERS}",
            )
        report = check_layers(folder.path, source, base, count, progress=clock, extras=extras)
        report = check_weights(report, folder.path, source, progress=clock)
    else:
        known: list[KnownText] = []
        reference = load_stored(
            source,
            options.precision,
            clock,
            before=lambda model: known.append(read_in_float32(model, folder.path, source)),
        )
        report = check_bundle(
            folder.path, reference, source.family, source.config, progress=clock, extras=extras
        )
        report = check_weights(report, folder.path, source, progress=clock)
        report = check_prefixes(
            report, folder.path, reference, source, progress=clock, extras=extras
        )
        del reference  # the check of an adapter loads a model of its own
        report = check_adapters(report, folder.path, source, progress=clock, extras=extras)
        if known:
            report = add_loss(report, known[0], folder.path)
    report = report.with_warnings(source.limits_of_check)
    if options.record_reference and report.passed:
        manifest = keep_recordings(folder, manifest, report, extras.recordings)
    manifest = replace(manifest, parity=report.to_dict())
    folder.seal(manifest)
    if options.report is not None:
        save_reports(options.report, folder.path, report, name=folder.output.resolve().name)
    return manifest, report


def _peak() -> int:
    usage = (
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return max(usage) * 1024  # Linux counts in KiB
