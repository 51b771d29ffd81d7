"""What the reference side of a check has to offer besides running."""

from __future__ import annotations

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
