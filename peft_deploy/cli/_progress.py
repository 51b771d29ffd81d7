"""The progress display: one line a phase, with a bar, the time left and the memory used."""

from __future__ import annotations

import resource
import time
from types import TracebackType

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

_ITEM_WIDTH = 48
_WIDE = 120  # characters; below that, bars are short and the time elapsed is left out


class RichProgress:
    """A :class:`peft_deploy.progress.Progress` on a terminal; a line a phase where there is none.

    A context manager.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._bars = Progress(*_columns(self._console.width), console=self._console, expand=True)
        self._live = self._console.is_terminal
        self._current: TaskID | None = None
        self._title = ""
        self._start = time.perf_counter()

    def __enter__(self) -> RichProgress:
        if self._live:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self._finish()
        if self._live:
            self._bars.stop()

    def phase(self, title: str, total: int | None = None, unit: str = "") -> None:
        """Closes the phase before and opens this one."""
        self._finish()
        self._title, self._start = title, time.perf_counter()
        if self._live:
            self._current = self._bars.add_task(title, total=total, unit=unit, item="")

    def advance(self, amount: int = 1, item: str = "") -> None:
        """Moves the bar."""
        if self._live and self._current is not None:
            shown = item if len(item) <= _ITEM_WIDTH else f"{item[: _ITEM_WIDTH - 1]}…"
            self._bars.update(self._current, advance=amount, item=shown)

    def _finish(self) -> None:
        if not self._title:
            return
        if not self._live:
            spent = time.perf_counter() - self._start
            self._console.print(f"{self._title} … {spent:.1f} s", soft_wrap=True)
        elif self._current is not None:
            task = next(t for t in self._bars.tasks if t.id == self._current)
            total = task.total or 1
            self._bars.update(self._current, total=total, completed=total, item="")
        self._title, self._current = "", None


def _columns(width: int) -> list[ProgressColumn]:
    """What fits into a line of so many characters."""
    wide = width >= _WIDE
    columns: list[ProgressColumn] = [
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24 if wide else 6),
        _Amount(),
        TimeRemainingColumn(compact=True),
        _Memory(),
    ]
    if wide:
        columns[4:4] = [TimeElapsedColumn()]
    # What is being worked on, or the loss: in the space that is left, if any.
    rest = Column(no_wrap=True, overflow="ellipsis", ratio=1)
    return [*columns, TextColumn("[dim]{task.fields[item]}", table_column=rest)]


class _Amount(ProgressColumn):
    def render(self, task: Task) -> Text:
        unit = task.fields.get("unit", "")
        if not unit:
            return Text("")
        if unit == "bytes":
            return Text(f"{decimal(int(task.completed))} of {decimal(int(task.total or 0))}")
        total = "" if task.total is None else f"/{int(task.total)}"
        return Text(f"{int(task.completed)}{total} {unit}")


class _Memory(ProgressColumn):
    """Peak resident memory of this process so far."""

    def render(self, task: Task) -> Text:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return Text(f"peak {decimal(peak)}", style="dim") if not task.finished else Text("")
