"""Root-mean-square norms (opset 23)."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.pattern import MatchResult, RewriteRule

from peft_deploy.convert.fusions.fusion import RuleFusion, axes_of, number


class _Normalized:
    """``x * rsqrt(mean(x²) + eps) * weight``, the factors in either order.

    Args:
        root_first: the reciprocal root stands before x.
        weight_last: the weight stands after what it scales.
    """

    def __init__(self, root_first: bool, weight_last: bool) -> None:
        self._root_first = root_first
        self._weight_last = weight_last

    def pattern(self, op: Any, x: Any, eps: Any, weight: Any) -> Any:
        """What the stand-ins' ``rms_norm`` is converted to."""
        mean = op.ReduceMean(
            op.Mul(x, x),
            _allow_other_inputs=True,
            _allow_other_attributes=True,
            _outputs=["mean"],
        )
        root = op.Reciprocal(op.Sqrt(op.Add(mean, eps)))
        normalized = op.Mul(root, x) if self._root_first else op.Mul(x, root)
        return op.Mul(normalized, weight) if self._weight_last else op.Mul(weight, normalized)

    def check(
        self, context: Any, x: ir.Value, eps: ir.Value, weight: ir.Value, mean: ir.Value, **_: Any
    ) -> MatchResult:
        """Over the last axis, with one weight a channel: another weight would be broadcast otherwise."""
        result = MatchResult()
        reduction = mean.producer()
        assert reduction is not None
        keepdims = reduction.attributes.get("keepdims")
        if axes_of(reduction) != (-1,) or (keepdims is not None and keepdims.as_int() != 1):
            return result.fail("the mean is not taken over the last axis")
        if number(eps) is None:
            return result.fail("epsilon is not a constant")
        if not is_vector(weight):
            return result.fail("the weight is not known to be one number a channel")
        return result

    def rewrite(self, op: Any, x: ir.Value, eps: ir.Value, weight: ir.Value, **_: Any) -> Any:
        """The operator computes the mean in float32 whatever the type of x (stash_type 1)."""
        return op.RMSNormalization(x, weight, axis=-1, epsilon=number(eps), stash_type=1)


def is_vector(value: ir.Value) -> bool:
    """Whether a value has one axis: a weight, or a weight that a number was added to or multiplied with."""
    if value.const_value is not None:
        return len(value.const_value.shape) == 1
    node = value.producer()
    if node is None or node.domain or node.op_type not in ("Add", "Mul") or len(node.inputs) != 2:
        return False
    one, other = node.inputs
    pairs = ((one, other), (other, one))
    return any(
        a is not None and number(b) is not None and a.const_value is not None and is_vector(a)
        for a, b in pairs
    )


def _rule(root_first: bool, weight_last: bool) -> RewriteRule:
    form = _Normalized(root_first, weight_last)
    return RewriteRule(form.pattern, form.rewrite, form.check)


RMS_NORMALIZATION = RuleFusion(
    "RMSNormalization",
    [_rule(first, last) for first in (True, False) for last in (True, False)],
    signs=["ReduceMean"],
)
