"""From a model and an adapter to a bundle on disk."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_deploy.base import BaseModel, open_base
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
from peft_deploy.bundle.folder import check_output
from peft_deploy.config.export import ONNX, ExportOptions
from peft_deploy.config.json_file import read_object
from peft_deploy.convert import ConversionJob
from peft_deploy.errors import CheckpointError, ConfigError, ParityError
from peft_deploy.progress import Progress, Silent
from peft_deploy.text import Tokenizer
from peft_deploy.workflows.sources import EXPORT_DTYPE, ExportSource, from_folders

if TYPE_CHECKING:
    from paddle import nn

    from peft_deploy.convert import ConvertedGraph, StaticProgram, WeightFile
    from peft_deploy.parity import ParityReport
    from peft_deploy.weights import TensorSource

_PACKAGES = ("peft-deploy", "onnx-ir", "onnxruntime", "numpy")


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
    adapter: str | Path | None = None,
    tokenizer: str | Path | None = None,
    options: ExportOptions | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Makes a bundle.

    Args:
        base: the base model's folder, a name that PaddleNLP can download, or a PaddleNLP model or ``LoRAModel`` in
            memory, which is left as it was.
        output: the bundle's folder.
        adapter: the adapter's folder, or ``NAME=FOLDER``; not for a model in memory, which brings its own.
        tokenizer: a folder with tokenizer files; for a model in memory.
        options: how; defaults are those of the command line.
        progress: is told about every phase.

    Raises:
        PeftDeployError: see :mod:`peft_deploy.errors`; the output folder is then as it was before.

    Example:
        >>> import peft_deploy
        >>> peft_deploy.export("base/", "bundle/", adapter="adapter/")  # doctest: +SKIP
    """
    options, clock = options or ExportOptions(), _Clock(progress or Silent())
    output = Path(output).expanduser()
    check_output(output, force=options.force)
    clock.phase("Reading names and shapes")
    base = open_base(base) if isinstance(base, str | Path) else base
    _check_combination(base, adapter, options)
    if options.dry_run:
        source = _source(base, adapter, tokenizer)
        plan = _plan(source, source.merged(EXPORT_DTYPE))
        return ExportResult(output, None, None, clock.done(), _peak(), plan)
    with ExitStack() as stack:
        # The child needs the configuration only: it starts before the files are looked into.
        early = isinstance(base, BaseModel)
        if early:
            job = stack.enter_context(ConversionJob(base.config, options.opset, options.format))
        source = _source(base, adapter, tokenizer)
        if not early:
            job = stack.enter_context(ConversionJob(source.config, options.opset, options.format))
        folder = stack.enter_context(BundleFolder(output, force=options.force))
        manifest = _fill(folder, source, job, options, clock)
        report = None
        if options.validate:
            manifest, report = _validate(folder, source, manifest, clock)
            if not report.passed and not options.keep_failed:
                raise ParityError(
                    f"the exported model does not compute what was trained: {report.summary()}",
                    hint="nothing was left behind; --keep-failed keeps the bundle for a closer look",
                    report=report,
                )
        folder.commit()
    return ExportResult(output, manifest, report, clock.done(), _peak())


def _check_combination(
    base: BaseModel | nn.Layer, adapter: str | Path | None, options: ExportOptions
) -> None:
    if adapter is None:
        return
    if not isinstance(base, BaseModel):
        raise ConfigError(
            "a model in memory brings its own adapter; give a folder as base to add one"
        )
    if not options.merge:
        raise ConfigError(
            "an adapter was given without saying what to do with it", hint="add --merge"
        )


def _source(
    base: BaseModel | nn.Layer, adapter: str | Path | None, tokenizer: str | Path | None
) -> ExportSource:
    if isinstance(base, BaseModel):
        return from_folders(base, adapter)
    from peft_deploy.workflows.in_memory import from_memory

    return from_memory(base, None if tokenizer is None else Path(tokenizer))


def _fill(
    folder: BundleFolder,
    source: ExportSource,
    job: ConversionJob,
    options: ExportOptions,
    clock: _Clock,
) -> Manifest:
    """Writes everything that a bundle has, the unvalidated manifest last."""
    from peft_deploy.convert import stream_weights

    generation = _read_companions(source)
    tensors = source.merged(EXPORT_DTYPE)
    fingerprint = source.fingerprint()
    folder.require_space(sum(tensors.info(name).nbytes for name in tensors.names()))
    with _weight_file(folder, options.format) as file:
        stream_weights(tensors, file, clock)  # while the child traces
        converted = job.result(clock.phase)
        clock.phase("Finishing the graph")
        source.check(converted.shapes)
        graph = _finish(converted, source, file, options)
    _write_configs(folder, source, generation, options.format)
    hashes = folder.hashes({file.path.name: file.sha256})
    manifest = _manifest(source, options, converted, hashes, fingerprint, graph)
    folder.seal(manifest)
    return manifest


def _weight_file(folder: BundleFolder, format: str) -> WeightFile:
    from peft_deploy.convert import ParamsFile, WeightFile

    if format == ONNX:
        return WeightFile(folder.path / MODEL_DATA, folder.output)
    return ParamsFile(folder.path / PARAMS, folder.output)


def _finish(
    converted: ConvertedGraph | StaticProgram,
    source: ExportSource,
    file: WeightFile,
    options: ExportOptions,
) -> dict[str, Any]:
    """Writes the graph beside its weights; returns what the manifest says of it."""
    from peft_deploy.convert import StaticProgram, write_program

    if isinstance(converted, StaticProgram):
        return {"operators": write_program(converted, file, file.path.with_name(PROGRAM))}
    # Here and not above: onnx-ir takes most of a second to import, which the child has better use for.
    from peft_deploy.workflows.graph import finish_graph

    return finish_graph(converted, source, file, options.opset, file.path.with_name(MODEL))


def _read_companions(source: ExportSource) -> dict[str, Any] | None:
    """Generation settings, if any; a damaged file is to be known before the work and not after it.

    Raises:
        CheckpointError: one of the files cannot be read.
    """
    files = {path.name: path for path in source.companions}
    if "tokenizer.json" in files:
        Tokenizer.from_folder(files["tokenizer.json"].parent)
    path = files.get("generation_config.json")
    return None if path is None else read_object(path, CheckpointError)


def _write_configs(
    folder: BundleFolder, source: ExportSource, generation: dict[str, Any] | None, format: str
) -> None:
    for file in source.companions:
        folder.copy(file)
    config = source.family.huggingface_config(source.config)
    folder.write_text("config.json", _json(config))
    family = source.family
    if family.genai_type is not None and format == ONNX:
        tokens = special_token_ids(source.config, generation)
        inputs = family.signature(source.config).input_names
        genai = genai_config(family.genai_type, family.dims(source.config), tokens, inputs)
        folder.write_text("genai_config.json", _json(genai))


def _manifest(
    source: ExportSource,
    options: ExportOptions,
    converted: ConvertedGraph | StaticProgram,
    hashes: dict[str, str],
    fingerprint: str,
    graph: dict[str, Any],
) -> Manifest:
    return Manifest(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions=_versions() | converted.versions,
        model_type=source.family.model_type,
        architecture=source.family.paddle_model(source.config),
        signature=source.family.signature(source.config, EXPORT_DTYPE),
        opset=options.opset if options.format == ONNX else None,
        format=options.format,
        precision="fp32",
        base={"name": source.name, "layout": source.layout, "fingerprint": fingerprint},
        adapters=[_adapter_entry(source)] if source.adapter else [],
        files=hashes,
        graph=graph,
    )


def _adapter_entry(source: ExportSource) -> dict[str, Any]:
    assert source.adapter is not None
    adapter = source.adapter.adapter
    return {
        "name": source.adapter.name,
        "method": "lora",
        "mode": "merged",
        "rank": adapter.config.r,
        "scaling": adapter.config.scaling,
        "targets": sorted(adapter.pairs),
        "replaced": sorted(adapter.replacements),
        "fingerprint": adapter.fingerprint,
    }


def _validate(
    folder: BundleFolder, source: ExportSource, manifest: Manifest, clock: _Clock
) -> tuple[Manifest, ParityReport]:
    clock.phase("Preparing the check")
    from peft_deploy.workflows.validate import check_bundle

    reference = source.load_reference(clock)
    report = check_bundle(folder.path, reference, source.family, source.config, progress=clock)
    manifest = replace(manifest, parity=report.to_dict())
    folder.seal(manifest)
    return manifest, report


def _plan(source: ExportSource, tensors: TensorSource) -> list[str]:
    total = sum(tensors.info(name).nbytes for name in tensors.names())
    plan = [
        f"base model {source.name}: {source.family.paddle_model(source.config)}, {len(tensors.names())} tensors, "
        f"{source.layout} layout"
    ]
    if source.adapter:
        adapter = source.adapter.adapter
        plan.append(
            f"adapter {source.adapter.name}: LoRA of rank {adapter.config.r} on {len(adapter.pairs)} layers, "
            f"{len(adapter.replacements)} replaced tensors; it fits the base model"
        )
    plan.append(f"the bundle would hold {total / 1e6:,.0f} MB of {EXPORT_DTYPE} weights")
    return plan


def _versions() -> dict[str, str]:
    return {p: found[0].version for p in _PACKAGES if (found := list(distributions(name=p)))}


def _peak() -> int:
    usage = (
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return max(usage) * 1024  # Linux counts in KiB


def _json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


class _Clock:
    """Passes progress on and keeps the time of every phase."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._seconds: dict[str, float] = {}
        self._title = ""
        self._start = time.perf_counter()

    def phase(self, title: str, total: int | None = None, unit: str = "") -> None:
        self._stop()
        self._title = title
        self._progress.phase(title, total, unit)

    def advance(self, amount: int = 1, item: str = "") -> None:
        self._progress.advance(amount, item)

    def done(self) -> dict[str, float]:
        self._stop()
        return {title: round(seconds, 3) for title, seconds in self._seconds.items()}

    def _stop(self) -> None:
        now = time.perf_counter()
        if self._title:
            self._seconds[self._title] = self._seconds.get(self._title, 0.0) + now - self._start
        self._start = now
