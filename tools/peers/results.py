"""What a run found, as it is kept in a file, and the ratios that are drawn from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from peers.contenders import (
    EAGER,
    FP32,
    GENAI,
    INT4,
    INT4_ALL,
    LAST_LOGITS,
    OPTIMUM,
    OURS,
    RANK_8,
    RANK_64,
    SLOTS_OFF,
)
from peers.crew import Record

PREFILL, DECODE, EXPORT, MEMORY = "prefill", "decode", "export", "export_memory"


@dataclass(frozen=True)
class Export:
    """What making one contender's folder took; several runs where it was measured again.

    Args:
        name: the contender's.
        precision: likewise.
        seconds: of each run.
        peaks: memory of the process tree of each run, in bytes.
        disk: size of the folder's files, in bytes.
    """

    name: str
    precision: str
    seconds: list[float]
    peaks: list[int]
    disk: int


@dataclass(frozen=True)
class Run:
    """Everything that was measured.

    Args:
        machine: what it ran on, and the versions.
        prompt_tokens: length of the prompt.
        records: of the lanes.
        exports: of the contenders.
        missing: what is left out → why.
    """

    machine: dict[str, Any]
    prompt_tokens: int
    records: list[Record] = field(default_factory=list)
    exports: list[Export] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    def record(self, name: str, precision: str) -> Record | None:
        """A lane's record, if it took part."""
        found = [r for r in self.records if (r.name, r.precision) == (name, precision)]
        return found[0] if found else None

    def export(self, name: str, precision: str) -> Export | None:
        """What making a contender's folder took, if that was measured."""
        found = [e for e in self.exports if (e.name, e.precision) == (name, precision)]
        return found[0] if found else None

    def write(self, path: Path) -> None:
        """Keeps it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", "utf-8")

    @staticmethod
    def read(path: Path) -> Run:
        """What :meth:`write` kept."""
        data = json.loads(path.read_text("utf-8"))
        data["records"] = [Record(**record) for record in data["records"]]
        data["exports"] = [Export(**export) for export in data["exports"]]
        return Run(**data)


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one lane is as another: the median of what single rounds say, and their quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Bar:
    """A promise and what became of it.

    Args:
        title: what is compared.
        ratio: ours against theirs.
        limit: at least this much, or at most when ``below``.
        below: whether less is better.
    """

    title: str
    ratio: Ratio
    limit: float
    below: bool = False

    @property
    def passed(self) -> bool:
        """Whether the median keeps to the limit."""
        return self.ratio.median <= self.limit if self.below else self.ratio.median >= self.limit


def speed_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """How many times as fast as the other, from seconds that were taken in the same rounds."""
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} measurements against {len(theirs)}")
    return _ratio(np.asarray(theirs) / np.asarray(ours))


def _ratio(values: np.ndarray[Any, Any]) -> Ratio:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return Ratio(float(median), float(low), float(high))


# Who is compared with whom; a bar is left out when one of the two did not take part.
_SPEEDS = (
    (DECODE, (OURS, FP32), (GENAI, FP32), 1.05),
    # Its head has 4 bits, and ours 8 in int4.
    (DECODE, (OURS, INT4_ALL), (GENAI, INT4), 1.05),
    (DECODE, (OURS, FP32), (EAGER, FP32), 3.0),
    (PREFILL, (OURS, FP32), (GENAI, FP32), 1.05),
    (PREFILL, (OURS, FP32), (OPTIMUM, FP32), 1.05),
    (PREFILL, (LAST_LOGITS, FP32), (GENAI, FP32), 1.05),
    (PREFILL, (LAST_LOGITS, FP32), (OPTIMUM, FP32), 1.05),
    (DECODE, (SLOTS_OFF, FP32), (OURS, FP32), 0.97),
    (DECODE, (RANK_8, FP32), (OURS, FP32), 0.92),
    (DECODE, (RANK_64, FP32), (OURS, FP32), 0.85),
)
_MOST_EXPORT_TIME, _MOST_EXPORT_MEMORY = 0.7, 1.0  # of the builder's


def bars(run: Run) -> list[Bar]:
    """All promises that this run can say something about."""
    found = []
    for what, ours, theirs, limit in _SPEEDS:
        mine, other = run.record(*ours), run.record(*theirs)
        if mine and other:
            ratio = speed_ratio(getattr(mine, what), getattr(other, what))
            found.append(Bar(f"{what}, {' '.join(ours)} / {' '.join(theirs)}", ratio, limit))
    mine, builder = run.export(OURS, FP32), run.export(GENAI, FP32)
    if mine and builder:
        against = f"export --merge / {GENAI}"
        time = speed_ratio(builder.seconds, mine.seconds)
        peak = _ratio(np.asarray(mine.peaks) / np.asarray(builder.peaks))
        found.append(Bar(f"time, {against}", time, _MOST_EXPORT_TIME, below=True))
        found.append(Bar(f"peak memory, {against}", peak, _MOST_EXPORT_MEMORY, below=True))
    return found


def same_tokens(run: Run, record: Record) -> int | None:
    """How many of its tokens, from the first on, are those of the precision's reference in full precision.

    Lanes of another model, with an adapter off or another one on, have none.
    """
    reference = run.record(OURS, FP32)
    if reference is None or record.name in (SLOTS_OFF, RANK_64):
        return None
    count = 0
    for mine, other in zip(record.tokens, reference.tokens, strict=True):
        if mine != other:
            break
        count += 1
    return count
