"""How large the inputs of linear layers are on a text: what the errors of their weights are multiplied by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class Importance:
    """What a model's linear layers were given while it read a text.

    Args:
        squares: weight [in, out] of a linear layer → mean square of each of its inputs, float32 [in].
        text: what was read, for people.
        sha256: of the text, in hexadecimal.
        tokens: how many were read.
    """

    squares: Mapping[str, npt.NDArray[np.float32]]
    text: str
    sha256: str
    tokens: int

    def renamed(self, names: Mapping[str, str]) -> Importance:
        """Of a model of some of the layers.

        Args:
            names: its parameter → the one that it is here; others are left out.
        """
        found = {new: self.squares[old] for new, old in names.items() if old in self.squares}
        return replace(self, squares=found)
