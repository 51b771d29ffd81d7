"""What the reference side of a check has to offer besides running."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Protocol, runtime_checkable

from peft_deploy.runtime.runner import Runner


@runtime_checkable
class Reference(Runner, Protocol):
    """The model that was trained, with its adapter active and not merged."""

    def exact(self) -> Reference | None:
        """The same model computing in float64; None when it would be too large.

        The caller drops it as soon as it can: it may be twice as large as the reference.
        """
        ...

    def without_adapters(self) -> Runner | None:
        """The same model with its adapter inactive; None when it has no adapter."""
        ...


@runtime_checkable
class RoundableReference(Reference, Protocol):
    """A reference that can say what 16 bits would make of its numbers."""

    def rounded(self, dtype: str, peaks: MutableMapping[str, float]) -> Runner:
        """The same model as a 16-bit type would have it: what every module takes and gives is rounded.

        Args:
            dtype: ``float16`` or ``bfloat16``.
            peaks: module → the largest magnitude that it took or gave so far; grows with every run.
        """
        ...
