"""The interface that everything able to compute a graph's outputs has: ONNX Runtime, and the dynamic graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from peft_deploy.errors import ConfigError
from peft_deploy.signature import GraphSignature

Array = npt.NDArray[np.generic]

PROVIDERS = ("cpu", "cuda")  # what a bundle can run on, whichever runtime runs it


class Runner(Protocol):
    """Computes the outputs that a :class:`GraphSignature` names from the inputs that it names."""

    @property
    def signature(self) -> GraphSignature:
        """What goes in and comes out."""
        ...

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """The named outputs (all when None), for a full set of inputs.

        Raises:
            ExecutionError: the inputs do not fit the signature, or the runtime failed.
        """
        ...


def check_choices(provider: str, threads: int | None) -> None:
    """Passes when a runner can be opened like this.

    Args:
        provider: what it is to run on.
        threads: threads within one operator; None leaves it to the runtime.

    Raises:
        ConfigError: an unknown provider, or a number of threads below 1.
    """
    if provider not in PROVIDERS:
        raise ConfigError(f"provider {provider!r} is unknown; it can be {' or '.join(PROVIDERS)}")
    if threads is not None and threads < 1:
        raise ConfigError(f"{threads} threads cannot run a model; at least 1 is needed")
