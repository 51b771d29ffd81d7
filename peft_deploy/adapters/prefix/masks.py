"""Attention masks of the tokens, widened by the prefix.

PaddleNLP's decoders take keep-masks: 1 or True where a token may be attended to. An additive mask
(0 where it may, a large negative number where it may not) would be taken for its opposite, so
anything that is not clearly a keep-mask is refused.
"""

from __future__ import annotations

import paddle

from peft_deploy.adapters.prefix.errors import PrefixInputError

_HINT = "give a mask of integers or booleans, 1 or True where a token may be attended to"


def check_keep_mask(mask: paddle.Tensor) -> None:
    """Refuses what is not a keep-mask.

    Args:
        mask: [B, T], [B, S, T] or [B, 1 or H, S, T].

    Raises:
        PrefixInputError: another number of dimensions, other values than 0 and 1, or
            floating-point zeros everywhere, which mean "attend to nothing" in a keep-mask and
            "attend to everything" in an additive one.
    """
    if mask.ndim not in (2, 3, 4):
        raise PrefixInputError(
            f"attention_mask has the shape {list(mask.shape)}; it has to be [B, T], [B, S, T] or "
            "[B, 1, S, T]"
        )
    if mask.dtype == paddle.bool or not paddle.in_dynamic_mode():
        return
    zeros, ones = mask == 0, mask == 1
    if not bool(paddle.all(zeros | ones)):
        worst = float(mask.astype("float32").min()), float(mask.astype("float32").max())
        raise PrefixInputError(
            f"attention_mask holds values from {worst[0]:g} to {worst[1]:g}; only 0 and 1 have a "
            "meaning, and an additive mask would be taken for its opposite",
            hint=_HINT,
        )
    if mask.is_floating_point() and not bool(paddle.any(ones)):
        raise PrefixInputError(
            f"attention_mask holds {mask.dtype} zeros only, which may mean to attend to everything "
            "or to nothing",
            hint=_HINT,
        )


def widen_mask(mask: paddle.Tensor, num_prefix_tokens: int) -> paddle.Tensor:
    """The mask with P more columns in front, all of them to be attended to.

    Args:
        mask: a keep-mask, [..., T].
        num_prefix_tokens: P.

    Returns:
        [..., P + T], of the same type.
    """
    column = paddle.ones_like(mask[..., :1])
    return paddle.concat([*[column] * num_prefix_tokens, mask], axis=-1)
