"""A bundle against a model in memory: matrix, prompts and the check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_deploy.bundle import Manifest
from peft_deploy.config.precision import precision_dtype
from peft_deploy.families import Family
from peft_deploy.parity.cases import CaseMatrix, build_matrix
from peft_deploy.parity.encoder_cases import EncoderSizes, build_encoder_matrix
from peft_deploy.parity.gate import CheckOptions, check_expectation
from peft_deploy.parity.generation import IntArray, Prompt, Scores, score_tokens
from peft_deploy.parity.measurement import measure_reference
from peft_deploy.parity.oracle import Reference
from peft_deploy.parity.passages import PASSAGE, PROMPTS
from peft_deploy.parity.report import ParityReport
from peft_deploy.progress import Progress, Silent
from peft_deploy.runtime import EncoderDecoderRunner, OnnxRunner, Runner, open_runner
from peft_deploy.runtime.exact_arithmetic import exact_arithmetic
from peft_deploy.text import Tokenizer
from peft_deploy.workflows.check_encoder import check_encoder
from peft_deploy.workflows.check_extras import CheckExtras

if TYPE_CHECKING:
    from paddle import nn


NEW_TOKENS = 32


_TOKENIZER = "tokenizer.json"


@exact_arithmetic()
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
    manifest = Manifest.read(folder)
    expected = reference.signature.with_cache_in(precision_dtype(manifest.precision))
    if manifest.signature.last_logits:
        expected = expected.with_last_logits()
    runner = runner or open_runner(folder, expected, provider=provider)
    report = check_runner(
        folder,
        reference,
        runner,
        family.dims(config).max_positions,
        encoder=None if reference.signature.past else EncoderSizes.of(family, config),
        provider=provider,
        seed=seed,
        progress=progress,
        extras=extras,
    )
    return check_encoder(
        replace(report, warnings=[*report.warnings, *_elsewhere(runner)]),
        folder,
        model,
        family,
        config,
        provider=provider,
        seed=seed,
        progress=progress,
        extras=extras,
    )


def _elsewhere(runner: Runner) -> list[str]:
    """What a reader has to know of the nodes that do not run where they were meant to; nothing on the CPU."""
    both = (
        [runner.encoder, runner.decoder] if isinstance(runner, EncoderDecoderRunner) else [runner]
    )
    placements = [one.placement for one in both if isinstance(one, OnnxRunner)]
    return [str(p) for p in placements if p is not None and p.elsewhere]


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
        folder: the bundle, for its tokenizer and its precision.
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
        reference, matrix, dtype=arithmetic_of(folder), progress=progress
    )
    report = check_expectation(
        expectation, runner, prompts, judge, options=options, progress=progress
    )
    extras.keep(expectation, prompts, scores, options)
    return report


def arithmetic_of(folder: Path) -> str:
    """The element type that a bundle computes in."""
    return precision_dtype(Manifest.read(folder).precision)


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
