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

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates x [B, heads, S, D]; dimension i is paired with i + D/2 (the Llama convention)."""
        first, second = x.split(2, axis=-1)
        return paddle.concat([first * cos - second * sin, second * cos + first * sin], -1)


class NeighbourRotaryTable(RotaryTable):
    """The convention of GLM: neighbours (2i, 2i + 1) are paired, and only the first dimensions are rotated.

    Args:
        cos: [positions, pairs]; the dimensions of a head beyond 2 * pairs stay as they are.
        sin: [positions, pairs].
    """

    def __init__(self, cos: npt.NDArray[np.float32], sin: npt.NDArray[np.float32]) -> None:
        super().__init__(cos, sin)
        self.rotated = 2 * cos.shape[1]
        place = np.arange(self.rotated)
        self.pair, self.partner = place // 2, place ^ 1
        self.sign = np.where(self.partner > place, -1, 1).astype(np.float32)

    def at(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cos and signed sin for position_ids [B, S], each [B, 1, S, 2 * pairs], to be used by every layer."""
        cos, sin = (_pick(table, self.pair) for table in super().at(position_ids))
        return cos, sin * paddle.to_tensor(self.sign)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates x [B, heads, S, D]."""
        staying = x.shape[-1] - self.rotated
        if not staying:
            return x * cos + _pick(x, self.partner) * sin
        x, rest = x.split([self.rotated, staying], axis=-1)
        return paddle.concat([x * cos + _pick(x, self.partner) * sin, rest], -1)


def _pick(x: Tensor, places: npt.NDArray[np.int64]) -> Tensor:
    return paddle.index_select(x, paddle.to_tensor(places), axis=-1)
