"""What the reference gives for every text of a matrix, and how far it is from itself: the limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from peft_deploy.errors import ParityError
from peft_deploy.parity.cases import Case, CaseMatrix, Text
from peft_deploy.parity.clock import Clock
from peft_deploy.parity.compare import Difference, measure
from peft_deploy.parity.effect import Effect
from peft_deploy.parity.expectation import Expectation
from peft_deploy.parity.oracle import Reference, RoundableReference
from peft_deploy.parity.play import (
    Results,
    counted,
    expected,
    given_cache,
    read_text,
    run_case,
    token_axis,
)
from peft_deploy.parity.range import check_range
from peft_deploy.parity.tolerance import Limit, derive_limit, is_sane
from peft_deploy.progress import Progress
from peft_deploy.signature import LOGITS, GraphSignature

Differences = dict[str, Difference]
EXACT_ENOUGH = "float32"  # what Paddle itself computes in


def measure_reference(
    reference: Reference, matrix: CaseMatrix, *, dtype: str, progress: Progress
) -> Expectation:
    """What a bundle has to give, and how far it may be from that.

    Args:
        reference: the model with its adapter active.
        matrix: texts and cases.
        dtype: that the bundle computes in.
        progress: gets a phase.

    Raises:
        ParityError: see :func:`~peft_deploy.parity.gate.check`.
    """
    clock = Clock()
    progress.phase("Running the reference", len(matrix.texts) + len(matrix.cases), "cases")
    with clock.time("reference"):
        truth = _read_texts(reference, matrix.texts, progress)
        noise, warnings = _measure_noise(reference, matrix.cases, truth.known, dtype, progress)
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
    return compare_case(case, read_text(plain, text), known, source.signature, brief=True)


def _check_finite(text: Text, results: Results) -> None:
    for name, values in results.outputs().items():
        bad = int(np.count_nonzero(~np.isfinite(values)))
        if bad:
            raise ParityError(
                f"the reference model gives {bad} NaN or infinite values in {name} for "
                f"{text.name}; nothing can be compared with them",
                hint="look for NaN in the base model or the adapter: peft-deploy inspect",
            )


def compare_case(
    case: Case,
    results: Results,
    known: Mapping[Text, Results],
    signature: GraphSignature,
    *,
    brief: bool = False,
) -> Differences:
    """How far results are from what the texts of a case have to give, output by output; those that have nothing that
    counts, such as the logits of a last token that is padding, are left out.

    Args:
        case: that was run.
        results: of the run.
        known: what every text has to give.
        signature: of what ran it.
        brief: leave out what only a report needs.
    """
    want, have = expected(case, known, signature).values, results.values
    return {
        spec.name: measure(
            want[spec.name],
            have[spec.name],
            counts,
            axis=token_axis(spec),
            logits=spec.name == LOGITS,
            brief=brief,
        )
        for spec in signature.outputs
        if (counts := counted(case, spec)).any()
    }


def _measure_noise(
    reference: Reference,
    cases: Sequence[Case],
    known: Mapping[Text, Results],
    dtype: str,
    progress: Progress,
) -> tuple[list[Differences], list[str]]:
    """The reference's own differences on every case where it agrees with itself, and what to say
    of the rest.
    """
    noise, warnings = [], list[str]()
    peaks: dict[str, float] = {}
    signature = reference.signature
    for case in cases:
        cache = given_cache(case, known, signature) if case.given else {}
        results = run_case(reference, case, cache)
        differences = compare_case(case, results, known, signature, brief=True)
        wrong = [name for name, d in differences.items() if not is_sane(d)]
        if wrong:
            worst = max(wrong, key=lambda name: differences[name].relative_max)
            warnings.append(
                f"the reference disagrees with itself on “{case.name}”: {worst} differs by "
                f"{differences[worst].max_abs:.3g} from the same tokens read alone and unpadded; "
                "the bundle is held to the latter"
            )
        elif dtype == EXACT_ENOUGH:
            noise.append(differences)
        else:
            if not isinstance(reference, RoundableReference):
                raise ParityError(f"this model has no reference for a bundle in {dtype}")
            results = run_case(reference.rounded(dtype, peaks), case, cache)
            noise.append(compare_case(case, results, known, signature, brief=True))
        progress.advance(1, case.name)
    if not noise:
        raise ParityError(
            "the reference model agrees with itself on no case, so its numbers measure nothing",
            hint="look at the base model: its outputs change with padding and with the cache",
        )
    return noise, [*warnings, *check_range(peaks, dtype)]


def _derive_limits(noise: Sequence[Differences], *, exact: bool, dtype: str) -> dict[str, Limit]:
    return {
        name: derive_limit((d[name] for d in noise), exact=exact, dtype=dtype) for name in noise[0]
    }


def _blind(effect: Effect) -> str:
    proves_nothing = "this check proves nothing about it"
    if all(difference.max_abs == 0 for difference in effect.differences.values()):
        return f"the adapter changes nothing (is its lora_B still zero?): {proves_nothing}"
    return (
        f"the adapter changes {effect.subject} by {effect.main.max_abs:.3g} at most, which is too "
        f"little against the rounding noise: {proves_nothing}"
    )
