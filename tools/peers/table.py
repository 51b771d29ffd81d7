"""The tables: for the terminal, and in Markdown for README.md."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from peers.contenders import FP32, OURS, PRECISIONS
from peers.results import Bar, Export, Ratio, Run, bars, same_tokens, speed_ratio

HEADS = (
    "precision",
    "what",
    "export",
    "its peak",
    "on disk",
    "loading",
    "prefill",
    "ratio",
    "decode",
    "ratio",
    "same tokens",
)


def rows(run: Run) -> Iterator[tuple[str, ...]]:
    """The cells of every lane, by precision; ratios are speeds against our default export of the same precision."""
    for precision in PRECISIONS:
        reference = run.record(OURS, precision)
        for record in (r for r in run.records if r.precision == precision):
            prefill = decode = "-"
            if reference is not None and record is not reference:
                prefill = _short(speed_ratio(record.prefill, reference.prefill))
                decode = _short(speed_ratio(record.decode, reference.decode))
            same = same_tokens(run, record)
            yield (
                precision,
                record.name,
                *_export_cells(run.export(record.name, precision)),
                f"{statistics.median(record.load):.2f} s",
                f"{run.prompt_tokens / statistics.median(record.prefill):,.0f} tok/s",
                prefill,
                f"{1 / statistics.median(record.decode):.1f} tok/s",
                decode,
                "-" if same is None else f"{same}/{len(record.tokens)}",
            )


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
        _table(HEADS, list(rows(run))),
        _table(("promise", "measured (quartiles)", "bar", ""), list(bar_rows(run))),
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
        (("promise", "measured (quartiles)", "bar", ""), bar_rows(run)),
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


def _export_cells(export: Export | None) -> tuple[str, str, str]:
    if export is None:
        return "-", "-", "-"
    return (
        f"{statistics.median(export.seconds):.1f} s",
        f"{statistics.median(export.peaks) / 1e9:.2f} GB",
        f"{export.disk / 1e6:,.0f} MB",
    )


def _short(ratio: Ratio) -> str:
    return f"{ratio.median:.2f}"


def _limit(bar: Bar) -> str:
    return f"{'≤' if bar.below else '≥'} {bar.limit:.2f}"


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(
        f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *lines)
    ).replace("| --- | --- |", "|---|---|")
