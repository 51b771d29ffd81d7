"""The picture for README.md: how fast each contender decodes and reads a prompt, and what its export takes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers.contenders import OURS, PRECISIONS, SLOT_LANES, SLOTS
from peers.results import Run

# Told apart by lightness as well, for those who do not see colours, and on paper.
OUR_COLOUR, SLOTS_COLOUR, OTHER_COLOUR = "#1f4e79", "#7fb2d9", "#b8b8b8"
INCHES_WIDE, INCHES_A_BAR, INCHES_AROUND, DPI = 11.0, 0.25, 1.0, 100
ROOM = 1.22  # of the longest bar, so that its number fits in

Row = tuple[str, str, float]  # name, precision, number


def plot(run: Run, path: Path) -> None:
    """Draws it."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib.figure import Figure

    lanes = [r for precision in PRECISIONS for r in run.records if r.precision == precision]
    exports = [e for precision in PRECISIONS for e in run.exports if e.precision == precision]
    panels: dict[str, list[Row]] = {
        "decoding, tokens/s": [
            (r.name, r.precision, 1 / statistics.median(r.decode)) for r in lanes
        ],
        f"reading a prompt of {run.prompt_tokens}, tokens/s": [
            (r.name, r.precision, run.prompt_tokens / statistics.median(r.prefill)) for r in lanes
        ],
        "export, seconds": [(e.name, e.precision, statistics.median(e.seconds)) for e in exports],
    }
    height = INCHES_AROUND + INCHES_A_BAR * len(lanes)
    figure = Figure(figsize=(INCHES_WIDE, height), layout="constrained")
    all_axes = figure.subplots(1, len(panels), width_ratios=(1, 1, 0.8))
    for axes, (title, rows) in zip(all_axes, panels.items(), strict=True):
        _bars(axes, title, rows)
    all_axes[1].set_yticklabels([])  # the same as those on its left
    cores = run.machine["cores"]
    figure.suptitle(f"SmolLM2-135M, batch 1, {cores} CPU cores, one interleaved run", fontsize=11)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})


def _bars(axes: Any, title: str, rows: Sequence[Row]) -> None:
    places, place, before = [], 0.0, rows[0][1] if rows else ""
    for _, precision, _ in rows:
        place += 1.0 if precision == before else 1.6  # a gap between the precisions
        before = precision
        places.append(place)
    numbers = [number for *_, number in rows]
    drawn = axes.barh(places, numbers, height=0.78, color=[_colour(name) for name, *_ in rows])
    axes.bar_label(drawn, fmt="{:,.0f}", padding=2, fontsize=8)
    axes.set_yticks(places, [f"{name}  {precision}" for name, precision, _ in rows], fontsize=8)
    for label, (name, *_) in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if name.startswith(OURS) else "normal")
    axes.invert_yaxis()
    axes.set_xlim(0, ROOM * max(numbers, default=1))
    axes.set_title(title, fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _colour(name: str) -> str:
    if name in (*SLOT_LANES, SLOTS):
        return SLOTS_COLOUR
    return OUR_COLOUR if name.startswith(OURS) else OTHER_COLOUR
