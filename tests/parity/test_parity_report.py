from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from numpy_decoder import NumpyDecoder, Weights
from rich.console import Console

from peft_deploy.parity import (
    CaseMatrix,
    CaseResult,
    GenerationResult,
    ParityReport,
    Prompt,
    PromptResult,
    check,
)

PROMPTS = [Prompt("a b", (1, 2, 3)), Prompt("c", (4,))]


def shown(report: ParityReport, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(report.table())
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


@pytest.fixture
def good(reference: NumpyDecoder, good_bundle: NumpyDecoder, matrix: CaseMatrix) -> ParityReport:
    return check(reference, good_bundle, matrix, PROMPTS)


@pytest.fixture
def bad(reference: NumpyDecoder, good_bundle: NumpyDecoder, matrix: CaseMatrix) -> ParityReport:
    return check(
        reference, replace(good_bundle, position_offset=1, ignore_mask=True), matrix, PROMPTS
    )


def test_a_passed_report_says_how_near_it_came(good: ParityReport) -> None:
    assert good.worst is not None
    text = " ".join(shown(good).split())
    outputs = 7 * len(good.cases)
    assert f"Parity passed: {outputs} outputs in {len(good.cases)} cases agree" in text
    assert f"the worst at {good.worst[2].used:.0%} of its limit" in text
    assert "the greedy text is the same" in text
    assert "FAILED" not in text
    for group in {case.group for case in good.cases}:
        assert group in text
    assert "64/64" in text


def test_a_failed_report_names_the_place_and_both_values(bad: ParityReport) -> None:
    text = " ".join(shown(bad).split())
    failed = [case for case in bad.cases if not case.passed]
    assert f"Parity failed: {len(failed)} of {len(bad.cases)} cases differ" in text
    assert failed[0].worst is not None
    name, result = failed[0].worst
    d = result.difference
    assert (
        f"{name}{list(d.index)} is {d.actual:.6g}, the Paddle model says {d.expected:.6g}" in text
    )
    assert "FAILED" in text and f"and {len(failed) - 3} more cases" in text


def test_the_table_fits_a_terminal(good: ParityReport, bad: ParityReport) -> None:
    for report in (good, bad):
        lines = shown(report).splitlines()
        assert max(map(len, lines)) <= 80
        assert not any("…" in line for line in lines if "│" in line)


def test_the_manifest_form_is_plain_json_and_short(good: ParityReport, bad: ParityReport) -> None:
    for report in (good, bad):
        data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
        assert data["passed"] is report.passed
        assert len(data["cases"]) == len(report.cases)
        assert "outputs" not in data["cases"][0]
        assert data["cases"][0]["worst"]["limit_used"] == report.cases[0].worst[1].used  # type: ignore[index]
    assert len(json.dumps(good.to_dict())) < 40_000


def test_the_full_form_has_every_output(good: ParityReport) -> None:
    data = json.loads(json.dumps(good.to_dict(full=True), allow_nan=False))
    assert set(data["cases"][3]["outputs"]) == set(data["limits"]) == set(good.limits)


def test_specials_survive_json(
    reference: NumpyDecoder, good_bundle: NumpyDecoder, matrix: CaseMatrix
) -> None:
    report = check(reference, replace(good_bundle, nan_at_padding=True), matrix)
    data = json.dumps(report.to_dict(full=True), allow_nan=False)
    assert '"limit_used": "inf"' in data
    assert "NaN or infinite" in shown(report)


def test_a_warning_is_shown(weights: tuple[Weights, Weights], matrix: CaseMatrix) -> None:
    base, lora = weights
    silent = {k: 0 * v if k.endswith(".B") else v for k, v in lora.items()}
    report = check(NumpyDecoder(base, silent), NumpyDecoder(base), matrix)
    assert "Warning: the adapter changes nothing" in " ".join(shown(report).split())


def test_a_case_that_did_not_run_shows_why(good: ParityReport) -> None:
    broken = CaseResult("decode", "decode with cache", "batch 1", problem="no [kernel] for it")
    text = shown(replace(good, cases=(*good.cases[:2], broken)))
    assert "no [kernel] for it" in text and "FAILED" in text


def test_generated_text_that_differs_fails_alone(good: ParityReport) -> None:
    generation = GenerationResult((PromptResult("p", (1,), (2,)),), problem="it stopped")
    report = replace(good, generation=generation)
    assert not report.passed
    assert "the generated text differs from the Paddle model" in " ".join(shown(report).split())


def test_no_cases_prove_nothing(good: ParityReport) -> None:
    assert not replace(good, cases=()).passed
