"""A report as files: JSON, Markdown, JUnit XML, and the page in a browser."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from browser import Browser, find_browser
from json_schema import violations
from numpy_decoder import MAX_POSITIONS, NumpyDecoder, make_weights, merge

from peft_deploy.errors import OutputError
from peft_deploy.parity import (
    CaseResult,
    CheckOptions,
    GenerationResult,
    ParityReport,
    Prompt,
    build_matrix,
    check,
)
from peft_deploy.parity.bisect import Finding, Weight
from peft_deploy.parity.reports import HTML, JSON, JUNIT, MARKDOWN, Subject, write_reports
from peft_deploy.parity.table import explain_report

PROMPTS = [Prompt("a <b>bold</b> & `c` | d", (1, 2, 3)), Prompt("c\x00\x1b[31m", (4,))]
SUBJECT = Subject(
    name='merged "<script>alert(1)</script>"',
    model="LlamaForCausalLM (llama), fp32, opset 17",
    created="2026-01-01T00:00:00+00:00",
    base={"name": "tiny", "fingerprint": "ab" * 32},
    adapters=[{"name": "tuned", "method": "lora", "mode": "merged", "fingerprint": "cd" * 32}],
    versions={"numpy": "1.26.4"},
    files={"model.onnx": "12" * 32},
    decode=lambda ids: "".join(f"<{i}>\n" for i in ids),
)


@pytest.fixture(scope="module")
def reports() -> dict[str, ParityReport]:
    base, lora = make_weights()
    reference, bundle = NumpyDecoder(base, lora), NumpyDecoder(merge(base, lora))
    matrix = build_matrix(reference.signature, MAX_POSITIONS)
    options = CheckOptions(provider="cpu")
    wrong = replace(bundle, base=bundle.base | {"1.v": 1.8 * bundle.base["1.v"]})
    unwritten = replace(bundle, nan_at_padding=True)
    checked = {
        "good": check(reference, bundle, matrix, PROMPTS, options=options),
        "broken": check(reference, wrong, matrix, PROMPTS, options=options),
        "not numbers": check(reference, unwritten, matrix, PROMPTS, options=options),
    }
    refused = CaseResult("decode", "decode with cache", "batch 1", problem="no kernel <x>")
    checked["not run"] = replace(
        checked["good"],
        cases=(refused,),
        generation=GenerationResult((), problem="no kernel <x>"),
        warnings=["the adapter <b> changes nothing"],
    )
    checked["parts"] = replace(
        checked["good"], parts={"adapter <i>": checked["broken"], "prefix p": checked["good"]}
    )
    name, result = checked["broken"].cases[0].worst or ("", None)
    assert result is not None
    finding = Finding(
        *("case", "layers.0", "layers.0.mlp <b>", "output", name),
        *(result.difference, result.limit, ["/a/MatMul"], [Weight("w", "is <i>transposed</i>")]),
    )
    checked["found"] = replace(checked["broken"], finding=finding)
    return checked


KINDS = ["good", "broken", "not numbers", "not run", "parts", "found"]


@pytest.fixture(params=KINDS)
def written(
    request: pytest.FixtureRequest, reports: dict[str, ParityReport], tmp_path: Path
) -> tuple[Path, ParityReport]:
    report = reports[request.param]
    write_reports(tmp_path, report, SUBJECT)
    return tmp_path, report


def test_a_wrong_weight_is_said_first(reports: dict[str, ParityReport], tmp_path: Path) -> None:
    """It is the cause of what the other cases show."""
    weights = CaseResult("weights", "weights", "3 tensors", problem="1 is wrong:\n  w: not there")
    report = replace(reports["broken"], cases=(*reports["broken"].cases, weights))
    assert len(report.failed) > 10
    write_reports(tmp_path, report, SUBJECT)
    for name in (HTML, MARKDOWN):
        text = (tmp_path / name).read_text("utf-8")
        assert text.index("w: not there") < text.index(
            report.failed[1].name, text.index("What failed")
        )
    assert "w: not there" in explain_report(report).splitlines()[2]


def test_a_case_without_outputs_has_none_to_show(
    reports: dict[str, ParityReport], tmp_path: Path
) -> None:
    weights = CaseResult("weights", "weights", "3 tensors")
    good = reports["good"]
    write_reports(tmp_path, replace(good, cases=(*good.cases, weights)), SUBJECT)
    page = (tmp_path / HTML).read_text("utf-8")
    assert "3 tensors" in page
    assert "None" not in page


def test_json_is_what_the_schema_says(written: tuple[Path, ParityReport]) -> None:
    folder, report = written
    source = resources.files("peft_deploy.parity.reports").joinpath("report.schema.json")
    schema = json.loads(source.read_text("utf-8"))
    data = json.loads((folder / JSON).read_text("utf-8"))
    assert list(violations(data, schema, schema)) == []
    assert data["passed"] is report.passed and len(data["cases"]) == len(report.cases)
    assert "12" * 32 in data["subject"]["files"].values()
    data["cases"][0]["passed"] = "yes"
    del data["seed"]
    assert len(list(violations(data, schema, schema))) == 2, "the test's validator sees nothing"


def test_junit_counts_cases_and_prompts(written: tuple[Path, ParityReport]) -> None:
    folder, report = written
    suite = ElementTree.parse(folder / JUNIT).getroot().find("testsuite")
    assert suite is not None and report.generation is not None
    tests = suite.findall("testcase")
    cases, prompts = [], []
    for part in (report, *report.parts.values()):
        assert part.generation is not None
        cases += part.cases
        prompts += part.generation.prompts or [part.generation]
    assert int(suite.get("tests", "")) == len(tests) == len(cases) + len(prompts)
    assert len({(t.get("classname"), t.get("name")) for t in tests}) == len(tests)
    failed = [t for t in tests if t.find("failure") is not None]
    wanted = sum(not c.passed for c in cases) + sum(not p.passed for p in prompts)
    assert int(suite.get("failures", "")) == len(failed) == wanted
    assert bool(failed) is not report.passed
    for test in failed:
        failure = test.find("failure")
        assert failure is not None and len(failure.get("message", "")) > 10


def test_markdown_says_what_failed_and_holds_no_markup(
    written: tuple[Path, ParityReport],
) -> None:
    folder, report = written
    text = (folder / MARKDOWN).read_text("utf-8")
    assert ("FAILED" in text) is not report.passed
    assert "<script" not in text and "<b>" not in text and "<x>" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    plain = [row.replace("\\|", "") for row in rows]
    widths = {row.count("|") for row in plain}
    assert widths <= {3, 4, 6}, "a cell broke its table"


def test_the_page_in_a_browser(written: tuple[Path, ParityReport], tmp_path: Path) -> None:
    folder, report = written
    browser = Browser(find_browser(), tmp_path)
    dom, console = browser.open(folder / HTML)
    assert console == []
    assert "alert(1)&lt;/script&gt;" in dom and "<script" not in dom
    assert (">Failed<" in dom) is not report.passed and (">Passed<" in dom) is (
        report.passed or bool(report.parts)
    )
    sections = 1 + len(report.parts)
    circles = sections * len(report.limits) if report.cases[0].outputs else 0
    assert dom.count("<circle") == circles
    for case in report.cases:
        assert f"<td>{case.name}</td>" in dom
    assert ("is &lt;i&gt;transposed" in dom) is (report.finding is not None)


def test_the_page_fits_a_phone_and_asks_for_nothing(
    reports: dict[str, ParityReport], tmp_path: Path
) -> None:
    write_reports(tmp_path, reports["broken"], SUBJECT)
    text = (tmp_path / HTML).read_text("utf-8")
    for sign in ("http://", "https://", "<link", "<img", "url(", "@import", "<script"):
        assert sign not in text.replace("http-equiv", ""), sign
    framed = text.replace("default-src 'none'", "default-src * 'unsafe-inline'")
    frame = tmp_path / "frame.html"
    escaped = framed.replace("&", "&amp;").replace('"', "&quot;")
    frame.write_text(
        f'<iframe style="width:390px;height:800px;border:0" srcdoc="{escaped}"></iframe><p id=w>'
        "<script>onload = () => { const page = document.querySelector('iframe').contentDocument;"
        "document.getElementById('w').textContent = 'width=' +"
        " page.documentElement.scrollWidth; }</script>"
    )
    dom, console = Browser(find_browser(), tmp_path).open(frame)
    assert console == [] and "width=390" in dom


def test_the_browser_tells_of_errors(tmp_path: Path) -> None:
    """What the tests above find no trace of would have been found."""
    page = tmp_path / "bad.html"
    page.write_text("<script>nowhere()</script><p>text")
    _, console = Browser(find_browser(), tmp_path).open(page)
    assert any("nowhere is not defined" in line for line in console)


def test_wrong_tokens_are_marked(reports: dict[str, ParityReport], tmp_path: Path) -> None:
    write_reports(tmp_path, reports["broken"], SUBJECT)
    text = (tmp_path / HTML).read_text("utf-8")
    generation = reports["broken"].generation
    assert generation is not None and not generation.passed
    wrong = sum(len(p.actual) - p.agreeing for p in generation.prompts)
    assert text.count('class="token wrong" title') == wrong > 0
    write_reports(tmp_path, reports["good"], SUBJECT)
    assert 'class="token wrong" title' not in (tmp_path / HTML).read_text("utf-8")


def test_the_histogram_counts_every_error(reports: dict[str, ParityReport]) -> None:
    data = reports["good"].to_dict(full=True)
    counts = np.zeros(14, int)
    values = 0
    for case in data["cases"]:
        for output in case["outputs"].values():
            counts += output["histogram"]
            values += sum(output["histogram"])
            # no error is larger than the largest
            edge = int(np.flatnonzero(output["histogram"]).max())
            assert edge == 0 or output["relative_max"] >= 10.0 ** (edge - 13) * (1 - 1e-6)
    assert counts.sum() == values > 10_000
    assert "histogram" not in reports["good"].to_dict()["cases"][0]["worst"]


def test_older_reports_are_replaced_and_the_rest_stays(
    reports: dict[str, ParityReport], tmp_path: Path
) -> None:
    folder = tmp_path / "a" / "b"
    write_reports(folder, reports["broken"], SUBJECT)
    (folder / "notes.txt").write_text("mine")
    files = write_reports(folder, reports["good"], SUBJECT)
    assert [f.name for f in files] == [JSON, MARKDOWN, JUNIT, HTML]
    assert json.loads((folder / JSON).read_text())["passed"] is True
    assert len(list(folder.iterdir())) == 5


def test_a_folder_that_cannot_be_is_an_error(
    reports: dict[str, ParityReport], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file for the report cannot be made"):
        write_reports(tmp_path / "file", reports["good"], SUBJECT)
