"""The check itself: both sides through the same cases, limits from the reference's own noise."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from peft_deploy.errors import ExecutionError, ParityError
from peft_deploy.parity.cases import Case, CaseMatrix, Text
from peft_deploy.parity.compare import Difference, measure
from peft_deploy.parity.expectation import Expectation
from peft_deploy.parity.generation import (
    IntArray,
    Judge,
    Prompt,
    Scores,
    compare_generation,
    score_tokens,
)
from peft_deploy.parity.oracle import Reference
from peft_deploy.parity.play import (
    Results,
    counted,
    expected,
    given_cache,
    read_text,
    run_case,
    token_axis,
)
from peft_deploy.parity.report import CaseResult, Effect, OutputResult, ParityReport
from peft_deploy.parity.tolerance import Limit, derive_limit, is_sane
from peft_deploy.progress import Progress, Silent
from peft_deploy.runtime.runner import Runner
from peft_deploy.signature import LOGITS, GraphSignature

Differences = dict[str, Difference]


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


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Adds the duration of the block to the stage's."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent


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


def measure_reference(
    reference: Reference, matrix: CaseMatrix, *, dtype: str, progress: Progress
) -> Expectation:
    """What a bundle has to give, and how far it may be from that.

    Args:
        reference: the model with its adapter active.
        matrix: texts and cases.
        dtype: of the bundle's outputs.
        progress: gets a phase.

    Raises:
        ParityError: see :func:`check`.
    """
    clock = Clock()
    progress.phase("Running the reference", len(matrix.texts) + len(matrix.cases), "cases")
    with clock.time("reference"):
        truth = _read_texts(reference, matrix.texts, progress)
        noise, warnings = _measure_noise(reference, matrix.cases, truth.known, progress)
        limits = _derive_limits(noise, exact=truth.exact, dtype=dtype)
    effect = None if truth.effect is None else Effect(truth.effect, limits)
    if effect is not None and effect.is_blind:
        warnings.append(_blind(effect))
    return Expectation(
        matrix=matrix,
        known=truth.known,
        limits=limits,
        effect=effect,
        exact=truth.exact,
        warnings=tuple(warnings),
        seconds=clock.seconds,
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


@dataclass(frozen=True, eq=False)
class _Measure:
    """What the reference says about the texts.

    Args:
        known: what every text has to give.
        effect: what the adapter changes on the longest text; None without an adapter.
        exact: whether this was computed in float64.
    """

    known: Mapping[Text, Results]
    effect: Differences | None
    exact: bool


def _read_texts(reference: Reference, texts: Sequence[Text], progress: Progress) -> _Measure:
    exact = reference.exact()
    source = exact or reference
    known: dict[Text, Results] = {}
    for text in texts:
        known[text] = read_text(source, text)
        _check_finite(text, known[text])
        progress.advance(1, text.name)
    return _Measure(known, _measure_effect(source, known), exact is not None)


def _measure_effect(source: Reference, known: Mapping[Text, Results]) -> Differences | None:
    plain = source.without_adapters()
    if plain is None:
        return None
    text = max(known, key=len)
    slots = np.arange(len(text), dtype=np.int64)[None]
    case = Case(text.name, "texts", (text,), slots, (len(text),))
    return _compare(case, read_text(plain, text), known, source.signature, brief=True)


def _check_finite(text: Text, results: Results) -> None:
    for name, values in results.outputs().items():
        bad = int(np.count_nonzero(~np.isfinite(values)))
        if bad:
            raise ParityError(
                f"the reference model gives {bad} NaN or infinite values in {name} for "
                f"{text.name}; nothing can be compared with them",
                hint="look for NaN in the base model or the adapter: peft-deploy inspect",
            )


def _compare(
    case: Case,
    results: Results,
    known: Mapping[Text, Results],
    signature: GraphSignature,
    *,
    brief: bool = False,
) -> Differences:
    want, have = expected(case, known, signature).values, results.values
    return {
        spec.name: measure(
            want[spec.name],
            have[spec.name],
            counted(case, spec),
            axis=token_axis(spec),
            logits=spec.name == LOGITS,
            brief=brief,
        )
        for spec in signature.outputs
    }


def _measure_noise(
    reference: Reference,
    cases: Sequence[Case],
    known: Mapping[Text, Results],
    progress: Progress,
) -> tuple[list[Differences], list[str]]:
    """The reference's own differences on every case where it agrees with itself, and what to say
    of the rest.
    """
    noise, warnings = [], []
    for case in cases:
        signature = reference.signature
        cache = given_cache(case, known, signature) if case.given else {}
        results = run_case(reference, case, cache)
        differences = _compare(case, results, known, signature, brief=True)
        wrong = [name for name, d in differences.items() if not is_sane(d)]
        if wrong:
            worst = max(wrong, key=lambda name: differences[name].relative_max)
            warnings.append(
                f"the reference disagrees with itself on “{case.name}”: {worst} differs by "
                f"{differences[worst].max_abs:.3g} from the same tokens read alone and unpadded; "
                "the bundle is held to the latter"
            )
        else:
            noise.append(differences)
        progress.advance(1, case.name)
    if not noise:
        raise ParityError(
            "the reference model agrees with itself on no case, so its numbers measure nothing",
            hint="look at the base model: its outputs change with padding and with the cache",
        )
    return noise, warnings


def _derive_limits(noise: Sequence[Differences], *, exact: bool, dtype: str) -> dict[str, Limit]:
    return {
        name: derive_limit((d[name] for d in noise), exact=exact, dtype=dtype) for name in noise[0]
    }


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
                for name, difference in _compare(case, results, known, signature).items()
            }
            yield CaseResult(case.name, case.group, case.describe(), outputs, seconds=seconds)
        progress.advance(1, case.name)


def _blind(effect: Effect) -> str:
    proves_nothing = "this check proves nothing about it"
    if all(difference.max_abs == 0 for difference in effect.differences.values()):
        return f"the adapter changes nothing (is its lora_B still zero?): {proves_nothing}"
    return (
        f"the adapter changes {effect.subject} by {effect.main.max_abs:.3g} at most, which is too "
        f"little against the rounding noise: {proves_nothing}"
    )
