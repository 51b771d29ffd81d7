"""What the page's plots show: plain numbers and places, ready for the template to draw as SVG."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from peft_deploy.parity.compare import DECADES
from peft_deploy.parity.report import ParityReport
from peft_deploy.signature import LOGITS, PRESENT_KEY_TEMPLATE, PRESENT_VALUE_TEMPLATE

WIDTH, HEIGHT = 720, 280
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 40
_TEXT = 16  # room for the count above the tallest bar
_SMALLEST = 1e-12  # what is drawn for an error of 0
_LARGEST = 1e3  # what is drawn for an infinite one

_CACHE = {
    "keys": re.compile(re.escape(PRESENT_KEY_TEMPLATE).replace("%d", r"(\d+)")),
    "values": re.compile(re.escape(PRESENT_VALUE_TEMPLATE).replace("%d", r"(\d+)")),
}


@dataclass(frozen=True)
class Mark:
    """One output, at its worst.

    Args:
        x: where it stands, in pixels.
        error: of the error, likewise from the top.
        limit: of its limit.
        series: ``logits``, ``keys``, ``values`` or ``other``.
        title: what a reader sees when pointing at it.
        failed: whether the limit is broken.
    """

    x: float
    error: float
    limit: float
    series: str
    title: str
    failed: bool


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis, in pixels."""

    at: float
    label: str


@dataclass(frozen=True)
class LayerPlot:
    """The worst error of every output, by layer."""

    marks: Sequence[Mark]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    series: Sequence[str]


@dataclass(frozen=True)
class Bar:
    """One bin of the histogram.

    Args:
        x: its left edge, in pixels.
        width: in pixels.
        top: of the bar, in pixels.
        label: the bin's lower edge.
        count: errors in it.
    """

    x: float
    width: float
    top: float
    label: str
    count: int

    @property
    def short(self) -> str:
        """The count as it fits above the bar."""
        for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if self.count >= 10 * size:
                return f"{self.count / size:.0f}{letter}"
        return str(self.count) if self.count else ""


def layer_plot(report: ParityReport) -> LayerPlot | None:
    """Error and limit of each output at its worst case; None when nothing was compared.

    Args:
        report: what was found.
    """
    worst: dict[str, tuple[str, float, float, bool]] = {}  # output → case, error, limit, failed
    for case in report.cases:
        for name, result in case.outputs.items():
            error = result.difference.relative_max
            known = worst.get(name)
            if known is None or error > known[1]:
                failed = not result.passed or (known is not None and known[3])
                worst[name] = (case.name, error, result.limit.maximum, failed)
            elif not result.passed:
                worst[name] = (*known[:3], True)
    if not worst:
        return None
    places, x_ticks = _columns(list(worst))
    values = [v for _, error, limit, _ in worst.values() for v in (error, limit)]
    low, high = _range(values)
    marks = [
        Mark(
            places[name],
            _y(error, low, high),
            _y(limit, low, high),
            series(name),
            f"{name}: {error:.2e} of its scale in “{case}”, limit {limit:.2e}",
            failed,
        )
        for name, (case, error, limit, failed) in worst.items()
    ]
    y_ticks = [Tick(_y(10.0**p, low, high), f"1e{p}") for p in range(low, high + 1)]
    return LayerPlot(marks, x_ticks, y_ticks, list(dict.fromkeys(m.series for m in marks)))


def series(output: str) -> str:
    """What kind of output it is."""
    if output == LOGITS:
        return "logits"
    return next((kind for kind, name in _CACHE.items() if name.fullmatch(output)), "other")


def histogram(report: ParityReport) -> list[Bar]:
    """All errors of all cases by powers of ten; empty when nothing was compared.

    Args:
        report: what was found.
    """
    totals = [0] * (len(DECADES) + 1)
    for case in report.cases:
        for result in case.outputs.values():
            for i, count in enumerate(result.difference.histogram):
                totals[i] += count
    if not any(totals):
        return []
    width = (WIDTH - LEFT - RIGHT) / len(totals)
    labels = ["0", *(f"{edge:.0e}".replace("e-0", "e-").replace("e+00", "") for edge in DECADES)]
    tallest, room = math.log10(max(totals) + 1), HEIGHT - TOP - BOTTOM - _TEXT
    return [
        Bar(
            LEFT + i * width,
            width,
            HEIGHT - BOTTOM - room * math.log10(count + 1) / tallest,
            label,
            count,
        )
        for i, (count, label) in enumerate(zip(totals, labels, strict=True))
    ]


def _columns(names: Sequence[str]) -> tuple[dict[str, float], list[Tick]]:
    """Where each output stands: the layers from left to right, then whatever has no layer."""
    columns: dict[str, str] = {}
    for name in names:
        found = next((m for p in _CACHE.values() if (m := p.fullmatch(name))), None)
        columns[name] = found[1] if found else name
    layers = sorted({c for c in columns.values() if c.isdigit()}, key=int)
    order = [*layers, *dict.fromkeys(c for c in columns.values() if not c.isdigit())]
    step = (WIDTH - LEFT - RIGHT) / len(order)
    middle = {column: LEFT + (i + 0.5) * step for i, column in enumerate(order)}
    every = -(-len(layers) // 16) or 1
    ticks = [Tick(middle[c], c) for i, c in enumerate(layers) if i % every == 0]
    ticks += [Tick(middle[c], c) for c in order[len(layers) :]]
    kinds = {"keys": -0.12, "values": 0.12}
    places = {n: middle[c] + step * kinds.get(series(n), 0.0) for n, c in columns.items()}
    return places, ticks


def _range(values: Iterable[float]) -> tuple[int, int]:
    """The powers of ten that an axis has to span."""
    exponents = [math.log10(_drawn(value)) for value in values]
    low, high = math.floor(min(exponents)), math.ceil(max(exponents))
    return low, max(high, low + 1)


def _drawn(value: float) -> float:
    return _LARGEST if not math.isfinite(value) else min(max(value, _SMALLEST), _LARGEST)


def _y(value: float, low: int, high: int) -> float:
    share = (math.log10(_drawn(value)) - low) / (high - low)
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)
