"""Rotary position embedding (Su et al. 2021) with a table that is gathered by position."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import paddle
from paddle import Tensor, nn
from paddle.nn import functional as F


class RotaryTable(nn.Layer):  # type: ignore[misc]
    """cos and sin of every position, one column a pair of dimensions.

    Args:
        cos: [positions, D/2].
        sin: [positions, D/2].
    """

    def __init__(self, cos: npt.NDArray[np.float32], sin: npt.NDArray[np.float32]) -> None:
        super().__init__()
        self.register_buffer("cos", paddle.to_tensor(cos), persistable=False)
        self.register_buffer("sin", paddle.to_tensor(sin), persistable=False)

    def at(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cos and sin for position_ids [B, S], each [B, 1, S, D/2], to be used by every layer."""
        cos, sin = (F.embedding(position_ids, table) for table in (self.cos, self.sin))
        return cos.unsqueeze(1), sin.unsqueeze(1)

    @staticmethod
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates x [B, heads, S, D]; dimension i is paired with i + D/2 (the Llama convention)."""
        first, second = x.split(2, axis=-1)
        return paddle.concat([first * cos - second * sin, second * cos + first * sin], -1)
