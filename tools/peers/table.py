"""The tables: for the terminal, and in Markdown for README.md."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from peers.contenders import FP32, OURS, PRECISIONS, SLOT_LANES, SLOTS
from peers.crew import Record
from peers.results import Bar, Export, Run, bars, same_tokens, speed_ratio

HEADS = (
    "precision",
    "what",
    "export",
    "on disk",
    "loading",
    "memory",
    "prefill",
    "decode",
    "same tokens",
)
PICTURE = "docs/speed.png"  # from README.md
BAR_HEADS = ("promise", "measured (quartiles)", "bar", "")


def rows(run: Run) -> Iterator[tuple[str, ...]]:
    """The cells of every lane, by precision.

    Behind a speed stands its ratio to that of our default export of the same precision, taken within a round.
    """
    for precision in PRECISIONS:
        reference = run.record(OURS, precision)
        for record in (r for r in run.records if r.precision == precision):
            export = run.export(SLOTS if record.name in SLOT_LANES else record.name, precision)
            same = same_tokens(run, record)
            yield (
                precision,
                record.name,
                *_export_cells(export),
                f"{statistics.median(record.load):.2f} s",
                f"{record.memory / 1e9:.2f} GB",
                _speed(run.prompt_tokens, record, reference, "prefill"),
                _speed(1, record, reference, "decode"),
                "-" if same is None else f"{same}/{len(record.tokens)}",
            )


def _speed(tokens: int, record: Record, reference: Record | None, what: str) -> str:
    seconds = getattr(record, what)
    speed = tokens / statistics.median(seconds)
    text = f"{speed:,.0f}" if speed >= 100 else f"{speed:.1f}"
    if reference is None or reference is record:
        return f"{text} tok/s"
    return f"{text} tok/s ({speed_ratio(seconds, getattr(reference, what)).median:.2f})"


def bar_rows(run: Run) -> Iterator[tuple[str, ...]]:
    """The cells of every promise."""
    for bar in bars(run):
        yield bar.title, str(bar.ratio), _limit(bar), "ok" if bar.passed else "missed"


def markdown(run: Run) -> str:
    """Both tables and what they rest on."""
    machine = run.machine
    note = (
        f"SmolLM2-135M on {machine['cores']} cores ({machine['cpu']}), prompt of {run.prompt_tokens} tokens, batch 1, "
        f"{machine['rounds']} rounds; medians, ratios taken within a round."
    )
    left_out = [f"- {what}: {' '.join(why.split())}" for what, why in run.missing.items()]
    parts = [
        note,
        f"![Speed of each exporter's graph as bars]({PICTURE})",
        _table(HEADS, list(rows(run))),
        _table(BAR_HEADS, list(bar_rows(run))),
    ]
    if left_out:
        parts.append("\n".join(["Left out:", "", *left_out]))
    return "\n\n".join(parts)


def show(run: Run) -> None:
    """Prints both tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=160)
    for heads, lines in (
        (HEADS, rows(run)),
        (BAR_HEADS, bar_rows(run)),
    ):
        table = Table(box=None, pad_edge=False)
        for index, head in enumerate(heads):
            right = heads is HEADS and index > 1
            table.add_column(head, justify="right" if right else "left", no_wrap=True)
        for line in lines:
            table.add_row(*line)
        console.print(table)
        console.print()
    for what, why in run.missing.items():
        console.print(f"left out: {what} - {' '.join(why.split())}")
    differing = [
        f"{record.name} after {same_tokens(run, record)} tokens"
        for record in run.records
        if record.precision == FP32 and same_tokens(run, record) not in (None, len(record.tokens))
    ]
    verdict = "differ: " + ", ".join(differing) if differing else "are the same everywhere"
    console.print(f"greedy tokens in fp32 {verdict}")


def _export_cells(export: Export | None) -> tuple[str, str]:
    if export is None:
        return "-", "-"
    seconds, peak = statistics.median(export.seconds), statistics.median(export.peaks)
    return f"{seconds:.1f} s, {peak / 1e9:.2f} GB", f"{export.disk / 1e6:,.0f} MB"


def _limit(bar: Bar) -> str:
    return f"{'≤' if bar.below else '≥'} {bar.limit:.2f}"


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = "|" + "---|" * len(heads)
    head, *body = (f"| {' | '.join(cells)} |" for cells in (heads, *lines))
    return "\n".join([head, rule, *body])
