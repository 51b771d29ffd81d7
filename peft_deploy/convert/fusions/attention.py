"""Attention (opset 23) over keys and values that are there as a whole.

Heads are first in all that this takes and gives, [B, H, S, D]; :mod:`.attention_layout` then leaves out what the
operator does by itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.pattern import MatchResult, RewriteRule

from peft_deploy.convert.fusions.fusion import RuleFusion, number
from peft_deploy.convert.fusions.heads import constant_ints, size

_HEADS, _KEYS = 1, 3  # axes of a mask [B, H, S, T]


class _Form(ABC):
    """Softmax of scaled and masked scores, times values.

    Args:
        scaled: whether there is a factor of the queries; T5 has none.
    """

    def __init__(self, scaled: bool) -> None:
        self._scaled = scaled

    def rule(self) -> RewriteRule:
        """The rewrite rule for it."""
        return RewriteRule(self.pattern, self.rewrite, self.check)

    # Its arguments are the pattern's variables, by whose names they are found again.
    pattern: Callable[..., Any]

    def weighted(self, op: Any, q: Any, k: Any, v: Any, bias: Any, scale: Any) -> Any:
        """The part of the pattern that all forms have; k with its two last axes swapped."""
        scores = op.MatMul(op.Mul(q, scale) if self._scaled else q, k)
        return op.MatMul(op.Softmax(op.Add(scores, bias), axis=-1), v)

    @abstractmethod
    def mask(self, **found: ir.Value) -> ir.Value | str:
        """What is added to the scores, [B, H, S, T] or broadcast to it; or why the operator does not do the same."""

    def check(self, context: Any, **found: Any) -> MatchResult:
        """The factor is a number, and the mask can be the operator's."""
        result = MatchResult()
        if self._scaled and number(found["scale"]) is None:
            return result.fail("the factor of the scores is not a constant")
        mask = self.mask(**found)
        if isinstance(mask, str):
            return result.fail(mask)
        if mask.shape is None or len(mask.shape) != 4 or size(mask, _KEYS) == 1:
            return result.fail(
                "what is added to scores is not known to be [batch, heads, queries, keys]"
            )
        return result

    def rewrite(self, op: Any, q: ir.Value, k: ir.Value, v: ir.Value, **found: Any) -> Any:
        """The operator scales scores by 1/√D unless told otherwise."""
        scale = number(found["scale"]) if self._scaled else 1.0
        return op.Attention(q, k, v, self.mask(q=q, k=k, v=v, **found), scale=scale)


class _Attention(_Form):
    """As many heads of keys as of queries: what ``grouped_attention`` is converted to where H = K."""

    def pattern(self, op: Any, q: Any, k: Any, v: Any, bias: Any, scale: Any) -> Any:
        """See there."""
        return self.weighted(op, q, op.Transpose(k, perm=[0, 1, 3, 2]), v, bias, scale)

    def mask(self, **found: ir.Value) -> ir.Value | str:
        """See :class:`_Form`."""
        bias, heads = found["bias"], size(found["q"], _HEADS)
        if (
            heads is None
            or size(found["k"], _HEADS) != heads
            or size(bias, _HEADS) not in (1, heads)
        ):
            return "queries, keys and mask are not known to have as many heads as each other"
        return bias


class _GroupedAttention(_Form):
    """Fewer heads of keys: what ``grouped_attention`` is converted to where they are broadcast over groups."""

    def pattern(
        self,
        op: Any,
        q: Any,
        k: Any,
        v: Any,
        bias: Any,
        scale: Any,
        groups: Any,
        joined: Any,
        key_axis: Any,
        value_axis: Any,
    ) -> Any:
        """See there."""
        grouped = op.Reshape(q, groups)  # [B, K, G, S, D]
        keys = op.Transpose(op.Unsqueeze(k, key_axis), perm=[0, 1, 2, 4, 3])
        weighted = self.weighted(op, grouped, keys, op.Unsqueeze(v, value_axis), bias, scale)
        return op.Reshape(weighted, joined)

    def mask(self, **found: ir.Value) -> ir.Value | str:
        """See :class:`_Form`."""
        groups, joined = constant_ints(found["groups"]), constant_ints(found["joined"])
        if groups is None or len(groups) != 5 or groups[0] != 0 or groups[3] != -1:
            return "the heads of the queries are not put into groups"
        _, K, G, _, D = groups
        axes = [constant_ints(found[name]) for name in ("key_axis", "value_axis")]
        if joined != (0, K * G, -1, D) or axes != [(2,), (2,)]:
            return "the groups of heads are not put together again"
        if any(size(found[name], _HEADS) != K for name in "kv"):
            return "there is not one head of keys and values a group"
        widened = found["bias"].producer()
        if widened is None or widened.op_type != "Unsqueeze":
            return "what is added to the scores is not the same for all groups"
        bias = widened.inputs[0]
        # [B, 1, S, T] or, all heads being one group, [B, H, S, T].
        wanted = (1, G) if K == 1 else (1,)
        if (
            bias is None
            or constant_ints(widened.inputs[1]) != (1,)
            or size(bias, _HEADS) not in wanted
        ):
            return "what is added to the scores is not the same for all groups"
        return bias


ATTENTION = RuleFusion(
    "Attention",
    [form(scaled).rule() for form in (_GroupedAttention, _Attention) for scaled in (True, False)],
    signs=["Softmax"],
)
