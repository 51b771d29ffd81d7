"""The check itself: both sides through the same cases, limits from the reference's own noise."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from peft_deploy.errors import ExecutionError
from peft_deploy.parity.case_result import CaseResult, OutputResult
from peft_deploy.parity.cases import Case, CaseMatrix, Text
from peft_deploy.parity.clock import Clock
from peft_deploy.parity.expectation import Expectation
from peft_deploy.parity.generation import (
    IntArray,
    Judge,
    Prompt,
    Scores,
    compare_generation,
    score_tokens,
)
from peft_deploy.parity.measurement import compare_case, measure_reference
from peft_deploy.parity.oracle import Reference
from peft_deploy.parity.play import (
    Results,
    given_cache,
    run_case,
)
from peft_deploy.parity.report import ParityReport
from peft_deploy.parity.tolerance import Limit
from peft_deploy.progress import Progress, Silent
from peft_deploy.runtime.runner import Runner
from peft_deploy.signature import LOGITS


@dataclass(frozen=True)
class CheckOptions:
    """What a check covers.

    Args:
        seed: that the matrix was made with.
        real_text: whether the matrix and the prompts hold real text.
        new_tokens: how many tokens to generate from each prompt.
        provider: what runs the bundle, for the report.
    """

    seed: int = 0
    real_text: bool = False
    new_tokens: int = 32
    provider: str = ""


def check(
    reference: Reference,
    bundle: Runner,
    matrix: CaseMatrix,
    prompts: Sequence[Prompt] = (),
    *,
    options: CheckOptions | None = None,
    progress: Progress | None = None,
) -> ParityReport:
    """Whether the bundle computes what the reference computes.

    Args:
        reference: the model with its adapter active.
        bundle: the exported model.
        matrix: texts and cases.
        prompts: for greedy generation; none to leave it out.
        options: what the check covers.
        progress: gets a phase for the reference and one for the bundle.

    Raises:
        ParityError: the reference itself gives NaN or infinite values, so that nothing can be
            compared.
    """
    progress = progress or Silent()
    expectation = measure_reference(
        reference, matrix, dtype=logits_dtype(bundle), progress=progress
    )

    def judge(prompt: Prompt, tokens: IntArray) -> Scores:
        return score_tokens(reference, prompt, tokens)

    return check_expectation(
        expectation, bundle, prompts, judge, options=options, progress=progress
    )


def check_expectation(
    expectation: Expectation,
    bundle: Runner,
    prompts: Sequence[Prompt],
    judge: Judge,
    *,
    options: CheckOptions | None = None,
    progress: Progress | None = None,
) -> ParityReport:
    """Whether the bundle gives what is expected of it.

    Args:
        expectation: from the reference, now or earlier.
        bundle: the exported model.
        prompts: for greedy generation; none to leave it out.
        judge: gives what the reference thinks of a prompt's new tokens.
        options: what the check covers.
        progress: gets a phase for the cases and one for the generation.
    """
    options, progress, clock = options or CheckOptions(), progress or Silent(), Clock()
    clock.seconds.update(expectation.seconds)
    cases, limits = expectation.matrix.cases, expectation.limits
    progress.phase("Running the bundle", len(cases), "cases")
    with clock.time("bundle"):
        results = tuple(_run_bundle(bundle, cases, expectation.known, limits, progress))
    generation = None
    if prompts:
        progress.phase("Generating", options.new_tokens + len(prompts), "tokens")
        with clock.time("generation"):
            generation = compare_generation(
                judge, bundle, prompts, options.new_tokens, limits[LOGITS], progress
            )
    return ParityReport(
        cases=results,
        generation=generation,
        effect=expectation.effect,
        limits=limits,
        exact=expectation.exact,
        real_text=options.real_text,
        seed=options.seed,
        warnings=expectation.warnings,
        seconds=clock.seconds,
        provider=options.provider,
    )


def logits_dtype(bundle: Runner) -> str:
    """The element type of a runner's first output: the logits, where it has any."""
    return bundle.signature.outputs[0].dtype


def _run_bundle(
    bundle: Runner,
    cases: Sequence[Case],
    known: Mapping[Text, Results],
    limits: Mapping[str, Limit],
    progress: Progress,
) -> Iterator[CaseResult]:
    for case in cases:
        start = time.perf_counter()
        signature = bundle.signature
        cache = given_cache(case, known, signature) if case.given else {}
        try:
            results = run_case(bundle, case, cache)
        except ExecutionError as exc:
            yield CaseResult(case.name, case.group, case.describe(), problem=str(exc))
        else:
            seconds = time.perf_counter() - start
            outputs = {
                name: OutputResult(difference, limits[name])
                for name, difference in compare_case(case, results, known, signature).items()
            }
            yield CaseResult(case.name, case.group, case.describe(), outputs, seconds=seconds)
        progress.advance(1, case.name)
