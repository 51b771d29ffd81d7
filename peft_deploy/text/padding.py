"""Rows of different length made into one rectangular batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from peft_deploy.errors import ConfigError

Side = Literal["left", "right"]
SIDES: tuple[Side, ...] = ("left", "right")


@dataclass(frozen=True)
class PaddedBatch:
    """A batch as the graph wants it, all int64.

    Args:
        input_ids: [B, S], padded with the pad id.
        attention_mask: [B, S], 1 for a token and 0 for padding.
        position_ids: [B, S], each row's tokens counted from 0; 0 where there is padding.
    """

    input_ids: npt.NDArray[np.int64]
    attention_mask: npt.NDArray[np.int64]
    position_ids: npt.NDArray[np.int64]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row, padding not counted: [B]."""
        lengths: npt.NDArray[np.int64] = self.attention_mask.sum(axis=1)
        return lengths


def positions(attention_mask: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The position of every token in its row, padding on either side not counted.

    Args:
        attention_mask: [B, S] of 0 and 1.

    Returns:
        [B, S]: 0, 1, 2, … over the tokens of a row, 0 where the mask is 0.
    """
    counted = np.cumsum(attention_mask, axis=1, dtype=np.int64) - 1  # [B, S]
    return np.where(attention_mask == 1, counted, 0).astype(np.int64)


def pad_batch(rows: Sequence[Sequence[int]], pad_id: int, side: Side = "left") -> PaddedBatch:
    """The rows as one batch, padded to the longest.

    Args:
        rows: token ids of each row, none of them empty.
        pad_id: what stands where a row has no token; the mask hides it, so any id of the
            vocabulary will do.
        side: where the padding goes.

    Raises:
        ConfigError: no rows, an empty row, or an unknown side.
    """
    if side not in SIDES:
        raise ConfigError(f"padding side {side!r} is neither 'left' nor 'right'")
    if not rows:
        raise ConfigError("a batch needs at least one row of tokens, and there is none")
    for index, row in enumerate(rows):
        if len(row) == 0:
            raise ConfigError(
                f"row {index} of the batch has no tokens",
                hint="give every row at least one token, for example the begin-of-text token",
            )
    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)  # [B, S]
    mask = np.zeros((len(rows), width), dtype=np.int64)  # [B, S]
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, place] = row
        mask[index, place] = 1
    return PaddedBatch(ids, mask, positions(mask))
