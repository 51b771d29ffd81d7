"""The result of a parity check for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from peft_deploy.parity.case_result import CaseResult
from peft_deploy.parity.effect import Effect
from peft_deploy.parity.generation_result import GenerationResult, PromptResult
from peft_deploy.parity.report import ParityReport

_SHOWN_FAILURES = 3


def render(report: ParityReport) -> RenderableType:
    """A table of the case groups, the generation, what to know, and one closing sentence."""
    parts: list[RenderableType] = [_table(report)]
    parts += [Text(f"  {line}") for line in _failures(report)]
    if report.generation is not None:
        parts += [Text(f"  {line}") for line in _generation_failures(report.generation)]
    if report.effect is not None and not report.effect.is_blind:
        parts.append(Text(_effect(report.effect)))
    parts += [Text(f"Warning: {warning}", style="yellow") for warning in report.warnings]
    if report.finding is not None:
        parts.append(Text(str(report.finding)))
    if report.loss is not None:
        parts.append(Text(report.loss.sentence()))
    parts += [_part(name, part) for name, part in report.parts.items()]
    parts.append(
        Text(closing_sentence(report), style="bold green" if report.passed else "bold red")
    )
    return Group(*parts)


def _part(name: str, report: ParityReport) -> RenderableType:
    """All of what failed; of the rest what it says in the end."""
    title = f"With {name}: "
    if not report.passed:
        return Group(Text(title, style="bold"), render(report))
    effect = "" if report.effect is None or report.effect.is_blind else _effect(report.effect)
    warnings = [Text(f"  Warning: {warning}", style="yellow") for warning in report.warnings]
    return Group(Text(f"{title}{closing_sentence(report)} {effect}"), *warnings)


def _effect(effect: Effect) -> str:
    return (
        f"The adapter changes {effect.subject} by up to {effect.main.max_abs:.3g}; applied "
        f"{_percent(effect.sensitivity)} too strongly it would have failed."
    )


def closing_sentence(report: ParityReport) -> str:
    """Whether it passed, over how much, and how near to the limit the worst output came."""
    outputs = sum(len(case.outputs) for case in report.cases)
    if report.passed:
        worst = report.worst
        share = f", the worst at {worst[2].used:.0%} of its limit" if worst else ""
        also = f"; so do those with {', '.join(report.parts)}" if report.parts else ""
        only = f" ({report.layers})" if report.layers else ""
        return (
            f"Parity passed: {outputs} outputs in {len(report.cases)} cases agree with the "
            f"Paddle model{only}{share}{_generated(report.generation)}{also}."
        )
    if report.passed_alone:
        wrong = [name for name, part in report.parts.items() if not part.passed]
        return f"Parity failed with {', '.join(wrong)}, which differs from the Paddle model."
    failed = [case for case in report.cases if not case.passed]
    broken = f"{len(failed)} of {len(report.cases)} cases" if failed else "the generated text"
    return f"Parity failed: {broken} differ{'' if failed else 's'} from the Paddle model."


def _generated(generation: GenerationResult | None) -> str:
    if generation is None:
        return ""
    equal = "; the greedy text is the same"
    return equal if not generation.ties else f"{equal} but for {generation.ties} tie(s)"


def _table(report: ParityReport) -> Table:
    table = Table(title="Bundle against the Paddle model", title_justify="left")
    table.add_column("case", no_wrap=True)
    for heading in ("outputs", "worst error", "limit", "top-1"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    grouped: dict[str, list[CaseResult]] = {}
    for case in report.cases:
        grouped.setdefault(case.group, []).append(case)
    for name, cases in grouped.items():
        table.add_row(*_row(name, cases))
    if report.generation is not None:
        table.add_section()
        table.add_row(*_generation_row(report.generation))
    table.caption = "errors in units of the output's largest magnitude; mean = mean error"
    table.caption_justify = "left"
    return table


def _row(name: str, cases: Sequence[CaseResult]) -> list[str]:
    outputs = sum(len(case.outputs) for case in cases)
    worst = max(
        (case.worst for case in cases if case.worst is not None),
        key=lambda item: item[1].used,
        default=None,
    )
    passed = all(case.passed for case in cases)
    if worst is None:
        return [name, "", "", "", "", _verdict(passed)]  # no outputs, or it did not come so far
    _, result = worst
    difference, limit = result.difference, result.limit
    by_mean = difference.relative_mean / limit.mean > difference.relative_max / limit.maximum
    error = difference.relative_mean if by_mean else difference.relative_max
    allowed = limit.mean if by_mean else limit.maximum
    shares = [
        o.difference.top1
        for c in cases
        for o in c.outputs.values()
        if o.difference.top1 is not None
    ]
    return [
        name,
        str(outputs),
        f"{'mean ' if by_mean else ''}{error:.1e}",
        f"{allowed:.1e}",
        _percent(min(shares)) if shares else "",
        _verdict(passed),
    ]


def _generation_row(generation: GenerationResult) -> list[str]:
    prompts = generation.prompts
    tokens = sum(len(p.expected) for p in prompts)
    equal = sum(p.agreeing for p in prompts)
    ties = f"{generation.ties} tie(s)" if generation.ties else ""
    return [
        f"greedy text, {len(prompts)} prompts",
        "",
        ties,
        "",
        f"{equal}/{tokens}",
        _verdict(generation.passed),
    ]


def _verdict(passed: bool) -> str:
    return "[green]ok[/green]" if passed else "[red]FAILED[/red]"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _failures(report: ParityReport) -> list[str]:
    """The first failed cases: where the worst error is, and both values."""
    failed = report.failed
    lines = [explain_case(case) for case in failed[:_SHOWN_FAILURES]]
    if len(failed) > _SHOWN_FAILURES:
        lines.append(f"… and {len(failed) - _SHOWN_FAILURES} more cases")
    return lines


def explain_report(report: ParityReport) -> str:
    """The closing sentence, and the first failures of the bundle and of each part, a line each."""
    lines = [closing_sentence(report), *_failures(report)]
    if report.generation is not None and not report.generation.passed:
        lines += _generation_failures(report.generation)
    for name, part in report.parts.items():
        if not part.passed:
            lines += [f"With {name}:", *explain_report(part).splitlines()]
    return "\n".join(lines)


def share_of_limit(used: float) -> str:
    """How much of its limit an error takes up: ``40 %``, ``7.3 ×`` when it is broken."""
    return f"{100 * used:.0f} %" if used <= 1 else f"{used:.3g} \N{MULTIPLICATION SIGN}"


def explain_case(case: CaseResult) -> str:
    """Why a case failed, in one sentence; its worst output when it passed."""
    if case.problem is not None:
        return f"{case.name} ({case.shape}): {case.problem}"
    assert case.worst is not None  # it ran, so it has outputs
    name, result = case.worst
    d = result.difference
    specials = f", {d.unequal_specials} NaN or infinite values" if d.unequal_specials else ""
    off = f"{sum(not o.passed for o in case.outputs.values())} of {len(case.outputs)}"
    return (
        f"{case.name} ({case.shape}): {name}{list(d.index)} is {d.actual:.6g}, the Paddle model "
        f"says {d.expected:.6g}; {off} outputs are off{specials}"
    )


def _generation_failures(generation: GenerationResult) -> list[str]:
    if generation.problem is not None:
        return [f"greedy text: {generation.problem}"]
    return [explain_divergence(p) for p in generation.prompts if p.divergence is not None]


def explain_divergence(prompt: PromptResult) -> str:
    """Where a prompt's text stops being the reference's, in one sentence.

    Args:
        prompt: one whose texts differ.
    """
    d = prompt.divergence
    if d is None:
        raise ValueError("the texts do not differ")
    kind = "a tie" if d.is_tie else "too far for noise"
    return (
        f"{prompt.prompt!r}: token {d.step} is {d.actual}, the Paddle model says {d.expected} "
        f"and prefers it by {d.gap:.3g} ({kind}; noise reaches {d.noise:.3g})"
    )
