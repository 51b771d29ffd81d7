"""The operator set of fused graphs.

Paddle2ONNX writes up to opset 21, and ``Attention``, ``RotaryEmbedding`` and ``RMSNormalization`` came with 23. A
graph that is to be fused is converted at 21, and 23 is then declared in its place. That changes nothing for an
operator whose definition has not changed in between, and nothing for one whose newer definition only allows more types
of elements: opset 22 brought bfloat16 to functions that had been without it, opset 23 float4 to operators that move or
cast data.
:data:`SAME_MEANING` lists the operators for which that was read up; a test compares the definitions in onnxruntime.
"""

from __future__ import annotations

import onnx_ir as ir

from peft_deploy.config.export import FUSED_OPSET
from peft_deploy.errors import listed

# fmt: off
SAME_MEANING = frozenset({
    # The same definition at 21 and 23.
    "Abs", "Add", "And", "ArgMax", "ArgMin", "BitShift", "Ceil", "Clip", "Concat", "CumSum", "Div", "Equal",
    "Erf", "Exp", "Expand", "Floor", "Gather", "GatherElements", "GatherND", "Gelu", "Gemm", "Greater",
    "GreaterOrEqual", "IsInf", "IsNaN", "LayerNormalization", "LeakyRelu", "Less", "LessOrEqual", "Log", "LogSoftmax",
    "MatMul", "Max", "Mean", "Min", "Mod", "Mul", "Neg", "NonZero", "Not", "OneHot", "Or", "PRelu", "Pow", "Range",
    "Reciprocal", "ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum",
    "ReduceSumSquare", "Relu", "ScatterElements", "ScatterND", "Sigmoid", "Sign", "Slice", "Softmax", "Split", "Sqrt",
    "Sub", "Sum", "Tanh", "Tile", "TopK", "Trilu", "Where", "Xor",
    # 22: bfloat16.
    "Cos", "Elu", "HardSigmoid", "HardSwish", "Mish", "Round", "Selu", "Sin", "Softplus", "Softsign",
    # 23: float4.
    "Cast", "Constant", "ConstantOfShape", "Flatten", "Identity", "Pad", "Reshape", "Shape", "Size", "Squeeze",
    "Transpose", "Unsqueeze",
})
# fmt: on
CONTRIB = "com.microsoft"  # onnxruntime's own operators
# What the specification pairs with opset 23 (onnx 1.18).
FUSED_IR_VERSION = 11
_LAST_CONVERTED = 21
_FIRST_CONVERTED = 18  # reductions take their axes as an input, and Split its number of parts


def declare_fused(model: ir.Model) -> str | None:
    """Declares opset 23 for a graph of opset 21, unless an operator might mean something else in it.

    Args:
        model: changed in place.

    Returns:
        Why it was left as it is; None when it was not.
    """
    opset = model.opset_imports.get("", 0)
    if opset != FUSED_OPSET and not _FIRST_CONVERTED <= opset <= _LAST_CONVERTED:
        return (
            f"its operators are of opset {opset}, not of {_FIRST_CONVERTED} to {_LAST_CONVERTED}"
        )
    unknown = {
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        for node in model.graph
        if node.domain or node.op_type not in SAME_MEANING
    }
    if unknown and opset != FUSED_OPSET:
        return f"not known to mean the same in opset {FUSED_OPSET}:\n{listed(unknown)}"
    model.opset_imports[""] = FUSED_OPSET
    model.ir_version = max(model.ir_version, FUSED_IR_VERSION)
    return None
