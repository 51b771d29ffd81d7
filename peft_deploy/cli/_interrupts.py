"""Ctrl-C and SIGTERM as a KeyboardInterrupt that is not lost.

A handler may run between any two instructions of the main thread, and there are places where what it raises does harm.
In the callback of a weak reference Python prints it and goes on. The import system has such callbacks, and some of its
functions take a lock and only then enter the ``try`` that releases it: raised in between, every other thread that
imports something waits for ever (seen in ``_get_module_lock`` of CPython 3.11).
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

_LATER = 0.01  # seconds
_IMPORT_SYSTEM = "<frozen importlib._bootstrap>"


class Interrupts:
    """Turns the two signals into KeyboardInterrupt, once :meth:`install` was called.

    Attributes:
        number: of the signal that came last.
    """

    def __init__(self) -> None:
        self.number: int = signal.SIGINT
        self._unraisable_elsewhere = sys.unraisablehook

    def install(self) -> None:
        """Takes the place of the usual handlers; who ignores Ctrl-C, in the background, goes on doing so."""
        signal.signal(signal.SIGTERM, self._receive)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._receive)
        if hasattr(signal, "SIGALRM"):
            signal.signal(signal.SIGALRM, self._interrupt)
            sys.unraisablehook = self._unraisable

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._interrupt(number, frame)

    def _interrupt(self, _number: int, frame: FrameType | None) -> None:
        importing = frame is not None and frame.f_code.co_filename == _IMPORT_SYSTEM
        if importing and hasattr(signal, "SIGALRM"):
            signal.setitimer(signal.ITIMER_REAL, _LATER)
            return
        raise KeyboardInterrupt

    def _unraisable(self, lost: sys.UnraisableHookArgs) -> None:
        """An exception that nobody gets: an interrupt comes once more."""
        if issubclass(lost.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, _LATER)
        else:
            self._unraisable_elsewhere(lost)
