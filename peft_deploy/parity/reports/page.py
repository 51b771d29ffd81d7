"""The report as one HTML page that needs nothing else, not even a network.

Everything that comes from a bundle (names, prompts, tokens) goes through the template's escaping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from jinja2 import Environment, StrictUndefined

from peft_deploy.parity.case_result import CaseResult
from peft_deploy.parity.compare import Difference
from peft_deploy.parity.generation_result import PromptResult
from peft_deploy.parity.report import ParityReport
from peft_deploy.parity.reports import plots
from peft_deploy.parity.reports.subject import Subject
from peft_deploy.parity.table import explain_case, explain_divergence, share_of_limit

_TEMPLATE = "page.html.j2"


@dataclass(frozen=True)
class Token:
    """One token of a generated text.

    Args:
        text: as the page shows it.
        kind: ``same``, ``tie``, ``wrong``, or ``unknown`` where it could not be compared.
        title: both tokens, where they differ.
    """

    text: str
    kind: str
    title: str


@dataclass(frozen=True)
class Section:
    """What the page shows of the bundle, or of one part of its report.

    Args:
        report: of that part.
        plot: errors by layer, if anything was compared.
        bars: of the histogram.
        rows: each case, with what it says about the next token.
        texts: each prompt, its tokens, and where they part.
    """

    report: ParityReport
    plot: plots.LayerPlot | None
    bars: Sequence[plots.Bar]
    rows: Sequence[tuple[CaseResult, Difference | None]]
    texts: Sequence[tuple[PromptResult, Sequence[Token], str]]


def page(report: ParityReport, subject: Subject) -> str:
    """The text of the file.

    Args:
        report: what was found.
        subject: what it is about.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    source = resources.files(__package__).joinpath(_TEMPLATE).read_text("utf-8")
    parts = {"": report, **report.parts}
    text: str = environment.from_string(source).render(
        report=report,
        subject=subject,
        sections={title: _section(part, subject) for title, part in parts.items()},
        area=plots,
        explain=explain_case,
        share=share_of_limit,
    )
    return text


def _section(report: ParityReport, subject: Subject) -> Section:
    prompts = report.generation.prompts if report.generation else ()
    return Section(
        report=report,
        plot=plots.layer_plot(report),
        bars=plots.histogram(report),
        rows=[(case, _next_token(case)) for case in report.cases],
        texts=[(p, _tokens(p, subject), _parting(p)) for p in prompts],
    )


def _next_token(case: CaseResult) -> Difference | None:
    """The difference that says something about the next token, if the case has one."""
    differences = (output.difference for output in case.outputs.values())
    return next((d for d in differences if d.top1 is not None), None)


def _parting(prompt: PromptResult) -> str:
    return "" if prompt.divergence is None else explain_divergence(prompt)


def _tokens(prompt: PromptResult, subject: Subject) -> list[Token]:
    compared = len(prompt.actual) if prompt.compared is None else prompt.compared
    decisive = prompt.divergence
    tokens = []
    for step, (want, have) in enumerate(zip(prompt.expected, prompt.actual, strict=True)):
        text = subject.token(have).replace("\n", "↵") or "∅"
        if step >= compared:
            tokens.append(Token(text, "unknown", f"{have}; not compared"))
        elif want == have:
            tokens.append(Token(text, "same", str(have)))
        else:
            wrong = decisive is not None and not decisive.is_tie and step >= decisive.step
            title = f"{have}; the reference prefers {want} {subject.token(want)!r}"
            tokens.append(Token(text, "wrong" if wrong else "tie", title))
    return tokens
