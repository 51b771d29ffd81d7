"""The report as JUnit XML, which every CI system reads.

Each case of the matrix and each prompt is one test; the group is its class.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree

from peft_deploy.parity.case_result import CaseResult
from peft_deploy.parity.generation_result import PromptResult
from peft_deploy.parity.report import ParityReport
from peft_deploy.parity.reports.subject import Subject
from peft_deploy.parity.table import explain_case, explain_divergence

_SUITE = "peft-deploy parity"
# Characters that XML 1.0 has no way to write.
_UNWRITABLE = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(report: ParityReport, subject: Subject) -> str:
    """The text of the file.

    Args:
        report: what was found.
        subject: what it is about.
    """
    suite = ElementTree.Element("testsuite", name=f"{_SUITE}: {_clean(subject.name)}")
    _add_report(suite, report, "parity")
    for name, part in report.parts.items():
        _add_report(suite, part, f"parity with {_clean(name)}")
    tests, failures = len(suite), len(suite.findall("testcase/failure"))
    suite.attrib |= {"tests": str(tests), "failures": str(failures), "errors": "0", "skipped": "0"}
    suite.set("time", f"{sum(report.seconds.values()):.3f}")
    if report.warnings:
        ElementTree.SubElement(suite, "system-out").text = _clean("\n".join(report.warnings))
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _add_report(suite: ElementTree.Element, report: ParityReport, title: str) -> None:
    for case in report.cases:
        _add_case(suite, case, title)
    if report.generation is None:
        return
    if report.generation.problem is not None:
        group = f"{title}.greedy text"
        test = _test(suite, group, "all prompts", report.generation.seconds)
        _fail(test, report.generation.problem)
    for prompt in report.generation.prompts:
        _add_prompt(suite, prompt, title)


def _add_case(suite: ElementTree.Element, case: CaseResult, title: str) -> None:
    test = _test(suite, f"{title}.{case.group}", case.name, case.seconds)
    if not case.passed:
        _fail(test, explain_case(case))


def _add_prompt(suite: ElementTree.Element, prompt: PromptResult, title: str) -> None:
    test = _test(suite, f"{title}.greedy text", prompt.prompt, 0.0)
    if not prompt.passed:
        assert prompt.divergence is not None  # it failed, so there is a difference
        _fail(test, explain_divergence(prompt))


def _test(
    suite: ElementTree.Element, group: str, name: str, seconds: float
) -> ElementTree.Element:
    attributes = {"classname": _clean(group), "name": _clean(name)}
    return ElementTree.SubElement(suite, "testcase", attributes, time=f"{seconds:.3f}")


def _fail(test: ElementTree.Element, text: str) -> None:
    failure = ElementTree.SubElement(test, "failure", type="ParityError", message=_clean(text))
    failure.text = _clean(text)


def _clean(text: str) -> str:
    return _UNWRITABLE.sub("\ufffd", text)
