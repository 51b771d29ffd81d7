"""The interface that everything able to compute a graph's outputs has: ONNX Runtime, and the dynamic graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from peft_deploy.signature import GraphSignature

Array = npt.NDArray[np.generic]


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
