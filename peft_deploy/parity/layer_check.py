"""Whether a bundle computes what a layer computes, on random inputs: the check for models that no family knows.

The rule for the limits is that of :mod:`peft_deploy.parity.tolerance`: what float32 does to the layer itself, measured
against a float64 copy of it, where one can be had.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from peft_deploy.errors import ExecutionError, ParityError
from peft_deploy.parity.case_result import CaseResult, OutputResult
from peft_deploy.parity.clock import Clock
from peft_deploy.parity.compare import Difference, measure
from peft_deploy.parity.effect import Effect
from peft_deploy.parity.gate import CheckOptions
from peft_deploy.parity.layer_cases import LayerCase
from peft_deploy.parity.oracle import Reference
from peft_deploy.parity.report import ParityReport
from peft_deploy.parity.tolerance import Limit, derive_limit
from peft_deploy.progress import Progress, Silent
from peft_deploy.runtime.runner import Array, Runner
from peft_deploy.weights.source import DTYPES, FLOATING

Outputs = Mapping[str, Array]
_EQUAL = Limit(maximum=1e-300, mean=1e-300)  # whole numbers and truth values are right or wrong


def check_layer(
    reference: Reference,
    bundle: Runner,
    cases: Sequence[LayerCase],
    *,
    options: CheckOptions | None = None,
    progress: Progress | None = None,
) -> ParityReport:
    """Runs the cases on both sides and compares.

    Args:
        reference: the layer with its adapter active.
        bundle: the exported one.
        cases: at least one.
        options: seed and provider, for the report.
        progress: gets a phase for each side.

    Raises:
        ParityError: the layer itself gives NaN, so that nothing can be compared.
    """
    options, progress, clock = options or CheckOptions(), progress or Silent(), Clock()
    progress.phase("Running the reference", len(cases), "cases")
    with clock.time("reference"):
        single = [_run(reference, case) for case in cases]
        wide = _exact(reference, cases)
        known = single if wide is None else wide
        for case, outputs in zip(cases, known, strict=True):
            _check_numbers(case, outputs)
            progress.advance(1, case.name)
        noise = [_compare(w, s) for w, s in zip(known, single, strict=True)]
        limits = {name: _limit(name, known[0], noise, wide is not None) for name in noise[0]}
        effect = _effect(reference, cases[-1], single[-1], limits)
    progress.phase("Running the bundle", len(cases), "cases")
    with clock.time("bundle"):
        results = tuple(
            _result(bundle, case, outputs, limits)
            for case, outputs in zip(cases, known, strict=True)
        )
    warnings = []
    if effect is not None and effect.is_blind:
        warnings.append(
            "the adapter changes the outputs too little against the rounding noise (is its lora_B still zero?): "
            "this check proves nothing about it"
        )
    return ParityReport(
        cases=results,
        generation=None,
        effect=effect,
        limits=limits,
        exact=wide is not None,
        real_text=False,
        seed=options.seed,
        warnings=warnings,
        seconds=clock.seconds,
        provider=options.provider,
    )


def _run(runner: Runner, case: LayerCase) -> Outputs:
    feeds = {s.name: case.feeds[s.name].astype(DTYPES[s.dtype]) for s in runner.signature.inputs}
    return runner.run(feeds)


def _exact(reference: Reference, cases: Sequence[LayerCase]) -> list[Outputs] | None:
    """All outputs in float64; None where the layer's own code holds it to float32, or it is too large."""
    exact = reference.exact()
    if exact is None:
        return None
    try:
        return [_run(exact, case) for case in cases]
    except ExecutionError:
        return None


def _compare(want: Outputs, have: Outputs) -> dict[str, Difference]:
    return {name: _difference(values, have[name]) for name, values in want.items() if values.size}


def _difference(want: Array, have: Array) -> Difference:
    """Of two arrays of any shape; integers and truth values count as numbers."""
    flat = [array.astype(np.float64).reshape(-1) for array in (want, have)]
    everything = np.ones(want.size, np.bool_)
    found = measure(flat[0], flat[1], everything, axis=None, logits=False)  # type: ignore[arg-type]
    return replace(
        found, index=tuple(int(i) for i in np.unravel_index(found.index[0], want.shape))
    )


def _limit(
    name: str, outputs: Outputs, noise: Sequence[dict[str, Difference]], exact: bool
) -> Limit:
    if outputs[name].dtype.name not in FLOATING:
        return _EQUAL
    return derive_limit((differences[name] for differences in noise), exact=exact)


def _effect(
    reference: Reference, case: LayerCase, active: Outputs, limits: Mapping[str, Limit]
) -> Effect | None:
    plain = reference.without_adapters()
    return None if plain is None else Effect(_compare(active, _run(plain, case)), limits)


def _result(
    bundle: Runner, case: LayerCase, known: Outputs, limits: Mapping[str, Limit]
) -> CaseResult:
    shape = ", ".join(f"{name} {list(array.shape)}" for name, array in case.feeds.items())
    start = time.perf_counter()
    try:
        outputs = _run(bundle, case)
    except ExecutionError as exc:
        return CaseResult(case.name, case.group, shape, problem=str(exc))
    seconds = time.perf_counter() - start
    for name, values in known.items():
        have = outputs[name]
        kinds = [array.dtype.name in FLOATING for array in (values, have)]
        if have.shape != values.shape or kinds[0] != kinds[1]:
            problem = (
                f"{name} is {have.dtype.name} {list(have.shape)}; the layer gives {values.dtype.name} "
                f"{list(values.shape)}"
            )
            return CaseResult(case.name, case.group, shape, problem=problem)
    compared = _compare(known, outputs)
    results = {name: OutputResult(d, limits[name]) for name, d in compared.items()}
    return CaseResult(case.name, case.group, shape, results, seconds=seconds)


def _check_numbers(case: LayerCase, outputs: Outputs) -> None:
    for name, values in outputs.items():
        bad = int(np.count_nonzero(np.isnan(values.astype(np.float64))))
        if bad:
            raise ParityError(
                f"the layer gives {bad} NaN values in {name} for random inputs of {case.name}; nothing can be "
                "compared with them",
                hint="give the inputs a range for which the layer is meant",
            )
