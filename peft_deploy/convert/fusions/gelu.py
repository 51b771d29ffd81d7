"""Gaussian error linear units (opset 20), in the erf form and the tanh form (Hendrycks and Gimpel 2016)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.pattern import MatchResult, RewriteRule

from peft_deploy.convert.fusions.fusion import RuleFusion, number

# Constants are float32 here; one that is off by more than rounding is another function.
_RELATIVE = 1e-6

_ERF = {"half": 0.5, "one": 1.0, "root": math.sqrt(2)}
_TANH = {"half": 0.5, "one": 1.0, "scale": math.sqrt(2 / math.pi), "cubic": 0.044715}


def _erf(op: Any, x: Any, root: Any, one: Any, half: Any) -> Any:
    """What Paddle2ONNX makes of Paddle's ``gelu``."""
    return op.Mul(op.Mul(x, op.Add(op.Erf(op.Div(x, root)), one)), half)


def _tanh(op: Any, x: Any, cubic: Any, scale: Any, one: Any, half: Any) -> Any:
    """What the stand-ins' ``gelu_tanh`` is converted to."""
    bent = op.Add(x, op.Mul(op.Mul(op.Mul(x, x), x), cubic))
    return op.Mul(op.Mul(x, half), op.Add(op.Tanh(op.Mul(bent, scale)), one))


def _rule(form: Any, expected: Mapping[str, float], approximate: str) -> RewriteRule:
    def check(context: Any, x: ir.Value, **constants: Any) -> MatchResult:
        result = MatchResult()
        for name, wanted in expected.items():
            found = number(constants[name])
            if found is None or not math.isclose(found, wanted, rel_tol=_RELATIVE):
                return result.fail(f"{found} stands where GELU has {wanted:.6g}")
        return result

    def rewrite(op: Any, x: ir.Value, **_: Any) -> Any:
        return op.Gelu(x, approximate=approximate)

    return RewriteRule(form, rewrite, check)


GELU = RuleFusion(
    "Gelu",
    [_rule(_erf, _ERF, "none"), _rule(_tanh, _TANH, "tanh")],
    signs=["Erf"],
)
