"""The report as Markdown, as pull requests and job summaries show it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from peft_deploy.parity.case_result import CaseResult
from peft_deploy.parity.generation_result import PromptResult
from peft_deploy.parity.report import ParityReport
from peft_deploy.parity.reports.subject import Subject
from peft_deploy.parity.table import share_of_limit

_SHOWN_FAILURES = 10


def markdown(report: ParityReport, subject: Subject) -> str:
    """The text of the file.

    Args:
        report: what was found.
        subject: what it is about.
    """
    verdict = "passed" if report.passed else "FAILED"
    parts = [
        f"# Parity of {_plain(subject.name)}: {verdict}",
        _plain(report.summary()),
        *_body(report, subject),
    ]
    for name, part in report.parts.items():
        verdict = "passed" if part.passed else "FAILED"
        parts += [f"# With {_plain(name)}: {verdict}", _plain(part.summary())]
        parts += _body(part, subject)
    parts.append(_facts(report, subject))
    return "\n\n".join(part for part in parts if part) + "\n"


def _body(report: ParityReport, subject: Subject) -> list[str]:
    return [
        _groups(report),
        _failures(report.failed),
        _finding(report),
        _generation(report, subject),
        _effect(report),
        "" if report.loss is None else _plain(report.loss.sentence()),
        "\n".join(f"- Warning: {_plain(warning)}" for warning in report.warnings),
    ]


def _groups(report: ParityReport) -> str:
    grouped: dict[str, list[CaseResult]] = {}
    for case in report.cases:
        grouped.setdefault(case.group, []).append(case)
    rows = []
    for name, cases in grouped.items():
        worst = max((o.used for c in cases for o in c.outputs.values()), default=None)
        rows.append(
            [
                name,
                str(len(cases)),
                str(sum(len(c.outputs) for c in cases)),
                "" if worst is None else share_of_limit(worst),
                "ok" if all(c.passed for c in cases) else "**FAILED**",
            ]
        )
    return _table(["case", "cases", "outputs", "worst, of its limit", ""], rows)


def _failures(failed: Sequence[CaseResult]) -> str:
    if not failed:
        return ""
    lines = []
    for case in failed[:_SHOWN_FAILURES]:
        text = case.problem
        if text is None and case.worst is not None:
            name, result = case.worst
            d = result.difference
            text = (
                f"`{name}{list(d.index)}` is {d.actual:.6g}, the reference says "
                f"{d.expected:.6g}; {result.used:.3g} times its limit"
            )
            lines.append(f"- {_plain(case.name)} ({_plain(case.shape)}): {text}")
        else:
            lines.append(f"- {_plain(case.name)} ({_plain(case.shape)}): {_plain(text or '')}")
    if len(failed) > _SHOWN_FAILURES:
        lines.append(f"- and {len(failed) - _SHOWN_FAILURES} more cases")
    return "## What failed\n\n" + "\n".join(lines)


def _finding(report: ParityReport) -> str:
    if report.finding is None:
        return ""
    lines = [_plain(line) for line in str(report.finding).splitlines()]
    return "## Where it goes wrong\n\n" + "\n".join(f"- {line}" for line in lines)


def _generation(report: ParityReport, subject: Subject) -> str:
    generation = report.generation
    if generation is None:
        return ""
    if generation.problem is not None:
        return f"## Greedy text\n\nIt failed: {_plain(generation.problem)}"
    rows = [
        [prompt.prompt, f"{prompt.agreeing}/{len(prompt.actual)}", _parting(prompt, subject)]
        for prompt in generation.prompts
    ]
    return "## Greedy text\n\n" + _table(["prompt", "equal tokens", ""], rows)


def _parting(prompt: PromptResult, subject: Subject) -> str:
    d = prompt.divergence
    if d is None:
        return "ok"
    kind = "a tie" if d.is_tie else "**FAILED**"
    return (
        f"{kind}: token {d.step} is {subject.token(d.actual)!r}, the reference prefers "
        f"{subject.token(d.expected)!r} by {d.gap:.3g} (noise reaches {d.noise:.3g})"
    )


def _effect(report: ParityReport) -> str:
    effect = report.effect
    if effect is None or effect.is_blind:
        return ""
    return (
        f"The adapter changes {effect.subject} by up to {effect.main.max_abs:.3g}; applied "
        f"{effect.sensitivity:.2g} of itself too strongly it would have failed."
    )


def _facts(report: ParityReport, subject: Subject) -> str:
    limits = "the reference in float64" if report.exact else "the reference's own arrangements"
    rows = [
        ["model", subject.model],
        ["base model", f"{subject.base.get('name')} ({subject.base.get('fingerprint')})"],
        *(
            [f"adapter {entry.get('name')}", str(entry.get("fingerprint"))]
            for entry in subject.adapters
        ),
        ["made", subject.created],
        ["made with", ", ".join(f"{k} {v}" for k, v in subject.versions.items())],
        ["run by", report.provider],
        ["limits from", limits],
        ["seed", str(report.seed)],
    ]
    return "## What was checked\n\n" + _table(["", ""], rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header)]
    lines += [[_cell(value) for value in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|")


def _plain(text: str) -> str:
    """Text that cannot become markup: on one line, without HTML."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace("\\", "\\\\")
    return " ".join(escaped.replace("`", "\\`").split())
