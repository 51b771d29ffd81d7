"""Checks a bundle against the model that it was made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_deploy.base import BaseModel, open_base
from peft_deploy.base.folder import CONFIG
from peft_deploy.base.pooling import NO_POOLING
from peft_deploy.bundle import Manifest
from peft_deploy.config.export import RUNTIME
from peft_deploy.config.json_file import read_object
from peft_deploy.environment import require_paddle
from peft_deploy.errors import AdapterError, BundleError, CheckpointError, ConfigError
from peft_deploy.families import Family, Pooling
from peft_deploy.parity.cases import CaseMatrix, build_matrix
from peft_deploy.parity.encoder_cases import EncoderSizes, build_encoder_matrix
from peft_deploy.parity.gate import (
    CheckOptions,
    check_expectation,
    logits_dtype,
    measure_reference,
)
from peft_deploy.parity.generation import IntArray, Prompt, Scores, score_tokens
from peft_deploy.parity.oracle import Reference
from peft_deploy.parity.passages import PASSAGE, PROMPTS
from peft_deploy.parity.report import ParityReport
from peft_deploy.progress import Progress, Silent
from peft_deploy.runtime import EncoderDecoderRunner, Runner, open_runner
from peft_deploy.text import Tokenizer
from peft_deploy.workflows.bisect import check_bisectable, with_finding
from peft_deploy.workflows.check_adapters import check_adapter_origin, check_adapters
from peft_deploy.workflows.check_encoder import check_encoder
from peft_deploy.workflows.check_extras import CheckExtras, read_cases
from peft_deploy.workflows.check_prefixes import check_prefix_origin, check_prefixes
from peft_deploy.workflows.recorded_reference import check_recorded, read_recordings
from peft_deploy.workflows.sources import Adapters, ExportSource, from_folders

if TYPE_CHECKING:
    from paddle import nn

NEW_TOKENS = 32
_TOKENIZER = "tokenizer.json"


def validate(
    bundle: str | Path,
    base: str | Path | BaseModel | nn.Layer | None = None,
    *,
    adapter: Adapters = None,
    provider: str = "cpu",
    seed: int = 0,
    cases: str | Path | None = None,
    bisect: str | Path | None = None,
    progress: Progress | None = None,
) -> ParityReport:
    """Checks a bundle against the folders that it was made of. A bundle that fails is no error.

    Without a base model, what was recorded at the export takes its place; that needs no Paddle.

    Args:
        bundle: the bundle's folder.
        base: the base model's folder, or a name that PaddleNLP can download; None for the recorded reference. For
            a bundle of a layer, the layer or the ``LoRAModel`` around it.
        adapter: the folders of the adapters that the bundle was made with, if any.
        provider: what runs the bundle, ``"cpu"`` or ``"cuda"``.
        seed: of the random tokens.
        cases: a file of prompts that are to be checked, too: one a line, or a ``.jsonl`` of objects with a
            ``prompt`` or with ``ids``.
        bisect: a folder for the part of the graph that is at fault, should the bundle fail; the report then says
            where that is.
        progress: is told about every phase.

    Raises:
        BundleError: the folder is no bundle, or not what its manifest says; or without a base model, nothing was
            recorded.
        ConfigError: the cases cannot be used; or without a base model, an adapter, a seed or cases were given.
        CheckpointError: the base model is not the one that the bundle was made of.
        AdapterError: likewise the adapter.

    Example:
        >>> import peft_deploy
        >>> report = peft_deploy.validate("bundle/", "base/", adapter="adapter/")  # doctest: +SKIP
        >>> report.passed  # doctest: +SKIP
        True
    """
    folder, progress = Path(bundle).expanduser(), progress or Silent()
    manifest = Manifest.read(folder)
    if base is None:
        _check_recorded_options(adapter, seed, cases, bisect)
        recordings = read_recordings(folder, manifest)
        return check_recorded(folder, manifest, recordings, provider=provider, progress=progress)
    if bisect is not None:
        check_bisectable(manifest)
    if manifest.layer is not None:
        if cases is not None:
            raise ConfigError("cases are prompts, and the bundle is not of a language model")
        require_paddle("checking a bundle against its model")
        from peft_deploy.workflows.validate_layer import validate_layer

        return validate_layer(
            folder, manifest, base, adapter, provider=provider, seed=seed, progress=progress
        )
    if not isinstance(base, str | Path | BaseModel):
        raise ConfigError(
            f"a {type(base).__name__} in memory can only be checked against a bundle that was made of a layer",
            hint="give the base model's folder",
        )
    own = [] if cases is None else read_cases(Path(cases), folder)
    extras = CheckExtras(own, record=bisect is not None, bounded=False)
    kept = any(entry.get("mode") == RUNTIME for entry in manifest.adapters)
    source = from_folders(_as_exported(base, folder), adapter, keep=kept)
    progress.phase("Comparing fingerprints")
    check_origin(manifest, source)
    model = source.load_reference(progress)
    options: dict[str, Any] = {
        "provider": provider,
        "seed": seed,
        "progress": progress,
        "extras": extras,
    }
    report = check_bundle(folder, model, source.family, source.config, **options)
    if bisect is not None and not report.passed_alone:
        progress.phase("Looking for the first bad value")
        expectation = extras.recordings[0].expectation
        report = with_finding(report, folder, model, source, expectation, Path(bisect))
    report = check_prefixes(report, folder, model, source, **options)
    del model  # the check of an adapter loads a model of its own
    return check_adapters(report, folder, source, **options)


def _check_recorded_options(
    adapter: Adapters, seed: int, cases: str | Path | None, bisect: str | Path | None
) -> None:
    given = {
        "an adapter": adapter is not None,
        "a seed": seed != 0,
        "cases": cases is not None,
        "bisect": bisect is not None,
    }
    if wrong := [name for name, value in given.items() if value]:
        raise ConfigError(
            f"{wrong[0]} can only be used with the base model; without it the check is the one that was recorded",
            hint="add --base with the base model's folder",
        )


def _as_exported(base: str | Path | BaseModel, bundle: Path) -> BaseModel:
    """The base model, giving the sentence embeddings that the bundle gives."""
    path = bundle / CONFIG
    config = read_object(path, BundleError) if path.is_file() else {}
    pooling = Pooling.of(config) or NO_POOLING
    return base.pooled(pooling) if isinstance(base, BaseModel) else open_base(base, pooling)


def check_bundle(
    folder: Path,
    model: nn.Layer,
    family: Family,
    config: Mapping[str, Any],
    *,
    runner: Runner | None = None,
    provider: str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
    extras: CheckExtras | None = None,
) -> ParityReport:
    """Checks a bundle against a model in memory.

    Args:
        folder: the bundle, sealed or not.
        model: in the dynamic graph, its adapter active and not merged; left as it was.
        family: of the model.
        config: the base model's config.json.
        runner: of the bundle, where it is open already, such as one with an adapter active.
        provider: what runs the bundle.
        seed: of the random tokens.
        progress: gets a phase for the reference, the bundle and the generation.
        extras: what the check covers beyond its usual cases.
    """
    from peft_deploy.parity.reference import PaddleReference

    reference = PaddleReference(model, family, config)
    report = check_runner(
        folder,
        reference,
        runner or open_runner(folder, reference.signature, provider=provider),
        family.dims(config).max_positions,
        encoder=None if reference.signature.past else EncoderSizes.of(family, config),
        provider=provider,
        seed=seed,
        progress=progress,
        extras=extras,
    )
    return check_encoder(
        report,
        folder,
        model,
        family,
        config,
        provider=provider,
        seed=seed,
        progress=progress,
        extras=extras,
    )


def check_runner(
    folder: Path,
    reference: Reference,
    runner: Runner,
    max_positions: int,
    *,
    encoder: EncoderSizes | None = None,
    provider: str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
    extras: CheckExtras | None = None,
) -> ParityReport:
    """Checks whatever runs a bundle against a reference.

    Args:
        folder: the bundle, for its tokenizer.
        reference: the model that was trained.
        runner: runs the bundle.
        max_positions: that a text can have.
        encoder: more about a model without a cache, which generates nothing.
        provider: behind the runner, for the report.
        seed: of the random tokens.
        progress: gets a phase for the reference, the bundle and the generation.
        extras: what the check covers beyond its usual cases.
    """
    tokenizer = Tokenizer.from_folder(folder) if (folder / _TOKENIZER).is_file() else None
    real_ids = None if tokenizer is None else tokenizer.encode(PASSAGE)
    signature, prompts = reference.signature, list[Prompt]()
    if encoder is not None:
        matrix = build_encoder_matrix(signature, encoder, real_ids=real_ids, seed=seed)
    else:
        matrix = build_matrix(signature, max_positions, real_ids=real_ids, seed=seed)
        start = runner.start_token_id if isinstance(runner, EncoderDecoderRunner) else None
        prompts = make_prompts(matrix, tokenizer, start)
    room = max_positions - max((len(prompt.ids) for prompt in prompts), default=0)
    options = CheckOptions(
        seed=seed,
        real_text=tokenizer is not None,
        new_tokens=min(NEW_TOKENS, room),
        provider=provider,
    )
    extras = extras or CheckExtras()
    scores: list[Scores] = []
    matrix, prompts = extras.added(matrix, prompts, reference.signature, max_positions, options)

    def judge(prompt: Prompt, tokens: IntArray) -> Scores:
        scores.append(score_tokens(reference, prompt, tokens))
        return scores[-1]

    progress = progress or Silent()
    expectation = measure_reference(
        reference, matrix, dtype=logits_dtype(runner), progress=progress
    )
    report = check_expectation(
        expectation, runner, prompts, judge, options=options, progress=progress
    )
    extras.keep(expectation, prompts, scores, options)
    return report


def make_prompts(
    matrix: CaseMatrix, tokenizer: Tokenizer | None, start: int | None = None
) -> list[Prompt]:
    """Real prompts, or without a tokenizer the beginnings of the matrix's texts.

    Args:
        matrix: of the check.
        tokenizer: of the bundle, if it has one.
        start: the token that all texts begin with, where the prompts are what an encoder reads.
    """
    if start is not None:
        sources = {text.name: text.source for text in matrix.texts if text.source is not None}
        read = {name: source.tolist() for name, source in sources.items()}
        if tokenizer is not None:
            read = {text: tokenizer.encode(text) for text in PROMPTS}
        return [Prompt(text, (start,), tuple(source)) for text, source in read.items()]
    if tokenizer is not None:
        return [Prompt(text, tuple(tokenizer.encode(text))) for text in PROMPTS]
    return [
        Prompt(f"{text.name}, 8", tuple(text.ids[:8].tolist()))
        for text in matrix.texts
        if text.start == 0
    ]


def check_origin(manifest: Manifest, source: ExportSource) -> None:
    """Passes when a bundle was made of this base model and this adapter.

    Raises:
        CheckpointError: it was made of another base model.
        AdapterError: it was made with another adapter, or with none.
    """
    recorded = manifest.base["fingerprint"]
    if source.fingerprint() != recorded:
        raise CheckpointError(
            f"the bundle was made of the base model {manifest.base.get('name')} with fingerprint "
            f"{recorded[:12]}; {source.name} has {source.fingerprint()[:12]}",
            hint="give the base model that the bundle was exported from",
        )
    check_prefix_origin(manifest, source)
    if source.kept:
        check_adapter_origin(manifest, source)
    merged = [entry for entry in manifest.adapters if entry.get("mode") == "merged"]
    if source.adapter is None:
        if merged:
            names = ", ".join(str(entry["name"]) for entry in merged)
            raise AdapterError(
                f"the bundle has the adapter {names} merged into it, and none was given",
                hint="add --adapter with the folder of that adapter",
            )
        return
    fingerprint = source.adapter.adapter.fingerprint
    if not merged:
        raise AdapterError(
            f"the bundle was made without an adapter; {source.adapter.name} was given",
            hint="leave --adapter out",
        )
    if fingerprint not in [entry["fingerprint"] for entry in merged]:
        recorded = ", ".join(f"{e['name']} ({e['fingerprint'][:12]})" for e in merged)
        raise AdapterError(
            f"the bundle was made with the adapter {recorded}; {source.adapter.name} has the "
            f"fingerprint {fingerprint[:12]}",
            hint="give the very adapter that the bundle was exported with",
        )
