"""Where tokens stand, as the mask says it."""

from __future__ import annotations

import paddle
from paddle import Tensor


def tokens_up_to(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """How many real tokens there are up to each of the S new ones, itself and the past included: [B, S].

    Args:
        input_ids: [B, S].
        attention_mask: [B, T], of the past and the new tokens.
    """
    S = paddle.shape(input_ids)[1].cast("int64")
    T = paddle.shape(attention_mask)[1].cast("int64")
    counts = attention_mask.cumsum(-1)
    return paddle.slice(counts, axes=[1], starts=[T - S], ends=[T])
