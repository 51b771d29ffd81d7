"""The fusions in order."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes import common

from peft_deploy.convert.fusions.attention import ATTENTION
from peft_deploy.convert.fusions.attention_layout import JOIN_CACHE, LEAVE_HEADS_LAST, WIDEN_MASK
from peft_deploy.convert.fusions.fusion import ONNX, Fusion, folder_of
from peft_deploy.convert.fusions.gelu import GELU
from peft_deploy.convert.fusions.report import UNKNOWN_FORM, FusionReport
from peft_deploy.convert.fusions.rms_normalization import RMS_NORMALIZATION
from peft_deploy.convert.fusions.rotary_embedding import (
    PARTIAL_ROTARY_EMBEDDING,
    ROTARY_EMBEDDING,
)
from peft_deploy.convert.fusions.shapes import known_shapes
from peft_deploy.convert.fusions.skip_normalization import (
    SKIP_LAYER_NORMALIZATION,
    SKIP_RMS_NORMALIZATION,
)
from peft_deploy.convert.onnx_ir_log import quiet_onnx_ir
from peft_deploy.convert.opset import declare_fused

FUSIONS: tuple[Fusion, ...] = (
    # Before anything that takes a norm's output for granted.
    RMS_NORMALIZATION,
    GELU,
    # Rotation goes back to where heads are last, so that attention can, too.
    PARTIAL_ROTARY_EMBEDDING,
    ROTARY_EMBEDDING,
    ATTENTION,
    JOIN_CACHE,
    LEAVE_HEADS_LAST,
    # After those: takes the number of queries from what the operator gets in the end.
    WIDEN_MASK,
    SKIP_RMS_NORMALIZATION,
    SKIP_LAYER_NORMALIZATION,
)


def run_fusions(model: ir.Model, level: str) -> FusionReport:
    """Fuses a graph in place and declares the operator set that fused operators need.

    Args:
        model: cleaned up, its weights bound, its nodes named.
        level: ``"onnx"`` or ``"ort"``.

    Returns:
        How often each fusion found its pattern. A graph with an operator whose meaning in the newer set is not
        known stays as it is, in its own operator set, and the report says so.
    """
    report = FusionReport()
    report.refused = declare_fused(model)
    if report.refused is not None:
        return report
    fusions = [fusion for fusion in FUSIONS if fusion.level in (ONNX, level)]
    reasons: dict[str, dict[str, str]] = {}
    with known_shapes(model):
        for fusion in fusions:
            why = reasons.setdefault(fusion.name, {})
            count = fusion.apply(model, why)
            report.fused[fusion.name] = report.fused.get(fusion.name, 0) + count
    with quiet_onnx_ir():
        common.RemoveUnusedNodesPass()(model)
    for fusion in fusions:
        _name_plain(model, fusion, reasons[fusion.name], report)
    return report


def _name_plain(
    model: ir.Model, fusion: Fusion, reasons: Mapping[str, str], report: FusionReport
) -> None:
    for node in model.graph:
        if node.op_type in fusion.signs and not node.domain:
            folder = folder_of(node)
            report.leave(fusion.name, reasons.get(folder, UNKNOWN_FORM), folder)
