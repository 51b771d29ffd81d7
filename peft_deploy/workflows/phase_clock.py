"""How long the phases of a job took."""

from __future__ import annotations

import time

from peft_deploy.progress import Progress


class PhaseClock:
    """Passes progress on and keeps the time of every phase.

    Args:
        progress: is told about every phase.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._seconds: dict[str, float] = {}
        self._title = ""
        self._start = time.perf_counter()

    def phase(self, title: str, total: int | None = None, unit: str = "") -> None:
        """Ends the phase before and begins one; see :class:`~peft_deploy.progress.Progress`."""
        self._stop()
        self._title = title
        self._progress.phase(title, total, unit)

    def advance(self, amount: int = 1, item: str = "") -> None:
        """See :class:`~peft_deploy.progress.Progress`."""
        self._progress.advance(amount, item)

    def done(self) -> dict[str, float]:
        """Ends the last phase; title → seconds."""
        self._stop()
        return {title: round(seconds, 3) for title, seconds in self._seconds.items()}

    def _stop(self) -> None:
        now = time.perf_counter()
        if self._title:
            self._seconds[self._title] = self._seconds.get(self._title, 0.0) + now - self._start
        self._start = now
