"""Operators that stand for many: what a graph's small steps add up to, one file each.

A fusion is a :class:`~peft_deploy.convert.fusions.fusion.Fusion`: a pattern with a check and what takes its place, as
onnxscript's rewrite rules (:class:`~peft_deploy.convert.fusions.fusion.RuleFusion`), or a pass of its own where no
rule says it. :mod:`~peft_deploy.convert.fusions.pipeline` names them in order and runs them; what it returns says how
often each of them found its pattern, and what it had to leave. They run on a graph whose weights are bound. Imports
onnx-ir and onnxscript, and from this product nothing but the operator set and errors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_deploy.lazy import lazy_names

if TYPE_CHECKING:
    from peft_deploy.convert.fusions.fusion import Fusion, RuleFusion
    from peft_deploy.convert.fusions.pipeline import run_fusions
    from peft_deploy.convert.fusions.report import FusionReport

__all__ = ["Fusion", "FusionReport", "RuleFusion", "run_fusions"]

_HOME = {
    "Fusion": ".fusion",
    "FusionReport": ".report",
    "RuleFusion": ".fusion",
    "run_fusions": ".pipeline",
}


__getattr__ = lazy_names(__name__, _HOME)
