"""How long work reports on itself: library code calls a :class:`Progress`, the command line draws it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives what a long job is doing."""

    def phase(self, title: str, total: int | None = None, unit: str = "") -> None:
        """A new phase begins; the one before it is over.

        Args:
            title: what is being done, a verb first: ``"Tracing"``.
            total: how many units the phase has, None when that is unknown.
            unit: ``"tensors"``, ``"bytes"``, ``"steps"``, ``"cases"``.
        """
        ...

    def advance(self, amount: int = 1, item: str = "") -> None:
        """``amount`` more units of the current phase are done.

        Args:
            amount: units.
            item: what was just done, or figures worth showing beside the bar.
        """
        ...


class Silent:
    """A :class:`Progress` that shows nothing."""

    def phase(self, title: str, total: int | None = None, unit: str = "") -> None:
        """Does nothing."""

    def advance(self, amount: int = 1, item: str = "") -> None:
        """Does nothing."""
