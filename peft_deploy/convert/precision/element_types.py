"""Which element type every operator of a 16-bit graph computes in.

The rules, in the order in which they are asked:

- Reductions, exponentials and whatever else loses digits or leaves the range of 16 bits is computed in float32
  (:data:`SINGLE`), and so is arithmetic whose result goes nowhere else (the square in a norm, the cube in GELU).
- Products with weights, attention and fused operators, which keep float32 inside, are computed in 16 bits
  (:data:`HALF`).
- Arithmetic on float32 and 16-bit values, such as scores plus mask, is computed in float32; the next product with a
  weight rounds again. Numbers that 16 bits cannot hold (an epsilon of 1e-6, a mask of -3e38) count as float32.
- Whatever only moves values keeps their type.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum

import numpy as np
import onnx_ir as ir

SINGLE = frozenset(
    [
        "ReduceMean",
        "ReduceSum",
        "ReduceSumSquare",
        "ReduceL1",
        "ReduceL2",
        "ReduceMax",
        "ReduceMin",
        "ReduceLogSumExp",
        "Softmax",
        "LogSoftmax",
        "Exp",
        "Log",
        "Pow",
        "Sqrt",
        "Reciprocal",
        "Erf",
        "Tanh",
        "Softplus",
        "Mish",
        "CumSum",
        "Cos",
        "Sin",
        "Range",
        "ArgMax",
        "TopK",
    ]
)
HALF = frozenset(
    [
        "MatMul",
        "Gemm",
        "Attention",
        "RotaryEmbedding",
        "RMSNormalization",
        "LayerNormalization",
        "Gelu",
        "Swish",
        "Sigmoid",
        "Relu",
        "SimplifiedLayerNormalization",
        "SkipSimplifiedLayerNormalization",
        "SkipLayerNormalization",
        "GroupQueryAttention",
        "MultiHeadAttention",
        "QuickGelu",
        "FastGelu",
        "BiasGelu",
    ]
)
ARITHMETIC = frozenset(
    ["Add", "Sub", "Mul", "Div", "Max", "Min", "Neg", "Abs", "Sum", "Where", "Clip"]
)
MOVING = frozenset(
    [
        "Reshape",
        "Transpose",
        "Unsqueeze",
        "Squeeze",
        "Slice",
        "Split",
        "Expand",
        "Tile",
        "Identity",
        "Gather",
        "GatherElements",
        "GatherND",
        "Flatten",
        "Pad",
        "Concat",
        "ScatterND",
    ]
)
COMPARING = frozenset(["Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual"])
LOGICAL = COMPARING | frozenset(["Not", "And", "Or", "Xor", "IsNaN", "IsInf"])
_COUNTING = frozenset(["Shape", "Size", "NonZero", "ArgMax", "ArgMin"])
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


class Kind(Enum):
    """What an operator's operand is."""

    HALF = "of 16 bits"
    SINGLE = "float32"
    EITHER = "a constant or a weight, which can be had in both types"
    OTHER = "no floating-point number"


def constant_kind(tensor: ir.TensorProtocol, dtype: ir.DataType) -> Kind:
    """Of an initializer: float32 numbers that 16 bits cannot hold have to stay what they are.

    Args:
        tensor: the initializer.
        dtype: the 16-bit type.
    """
    if tensor.dtype not in _FLOATS:
        return Kind.OTHER
    if isinstance(tensor, ir.ExternalTensor | ir.LazyTensor) or tensor.dtype == dtype:
        return Kind.EITHER
    values = np.abs(tensor.numpy().astype(np.float64))
    values = values[values > 0]
    limits = np.finfo(np.float16) if dtype == ir.DataType.FLOAT16 else np.finfo(np.float32)
    fits = not values.size or (values.min() >= limits.tiny and values.max() <= limits.max)
    return Kind.EITHER if fits else Kind.SINGLE


def computed_in(node: ir.Node, operands: Iterable[Kind], pulled: bool) -> Kind:
    """The type that an operator computes in; OTHER when it has to do with no floating-point numbers.

    Args:
        node: the operator.
        operands: its inputs.
        pulled: whether all that is made of its result is computed in float32.
    """
    kinds = [kind for kind in operands if kind is not Kind.OTHER]
    if not kinds:
        return Kind.OTHER
    only_constants = all(kind is Kind.EITHER for kind in kinds)
    if node.op_type in HALF:
        return Kind.SINGLE if _float32_data(node, kinds) else Kind.HALF
    if node.op_type in MOVING:
        if node.op_type == "Concat":
            return Kind.HALF if Kind.HALF in kinds else kinds[0]
        return kinds[0]
    if node.op_type in ARITHMETIC | COMPARING and not pulled:
        return Kind.SINGLE if Kind.SINGLE in kinds or only_constants else Kind.HALF
    return Kind.SINGLE


def _float32_data(node: ir.Node, kinds: Sequence[Kind]) -> bool:
    """A norm or an activation of float32 values stays float32; what multiplies by weights does not."""
    return kinds[0] is Kind.SINGLE and node.op_type not in {
        "MatMul",
        "Gemm",
        "Attention",
        "RotaryEmbedding",
        "GroupQueryAttention",
        "MultiHeadAttention",
    }


def result_is_float(node: ir.Node, index: int) -> bool:
    """Whether an output of an operator on floating-point numbers is one, too."""
    if node.op_type in LOGICAL | _COUNTING:
        return False
    return not (node.op_type == "TopK" and index == 1)


def pulled_into_float32(graph: ir.Graph) -> set[ir.Node]:
    """Arithmetic whose results go only into operators that compute in float32."""
    pulled: set[ir.Node] = set()
    for node in reversed(graph):
        if node.op_type not in ARITHMETIC or node.domain:
            continue
        users = [user.node for value in node.outputs for user in value.uses()]
        leaves = any(value.is_graph_output() for value in node.outputs)
        if users and not leaves and all(u.op_type in SINGLE or u in pulled for u in users):
            pulled.add(node)
    return pulled
