"""Graphs with quantized weights as they would be without rounding activations, too.

``accuracy_level`` lets onnxruntime round what is multiplied by a quantized weight to int8. That is a property of the
kernel that it then takes, and no number in the bundle depends on it. A check that asks for float32 instead sees every
wrong block, scale or operator above noise of 1e-6, where the rounding would be 1e-2; what the rounding costs in
the end, the loss of a bundle says, which is measured as it runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

from peft_deploy.weights.block_quantized import MATMUL

if TYPE_CHECKING:
    import onnx_ir as ir

_FLOAT32_ACTIVATIONS = 1  # of accuracy_level
_exact: ContextVar[bool] = ContextVar("exact", default=False)


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """ONNX graphs that are opened in the block compute products with quantized weights in float32."""
    token = _exact.set(True)
    try:
        yield
    finally:
        _exact.reset(token)


def exact_model(path: Path) -> bytes | None:
    """The graph with float32 activations, its weights still in their file; None where it is that already.

    Args:
        path: of the ``.onnx`` file.
    """
    # Most graphs have no such operator, and need no package to be read in order to say so.
    if not _exact.get() or MATMUL.encode() not in path.read_bytes():
        return None
    import onnx_ir as ir

    model = ir.load(path)
    return ir.to_proto(model).SerializeToString() if without_rounding(model) else None


def without_rounding(model: ir.Model) -> bool:
    """Makes every product with quantized weights one in float32.

    Returns:
        Whether there was one that rounds what it multiplies.
    """
    import onnx_ir as ir

    from peft_deploy.convert.precision.block_quantized import ACCURACY_LEVEL

    rounding = [n for n in model.graph if n.op_type == MATMUL and ACCURACY_LEVEL in n.attributes]
    for node in rounding:
        node.attributes[ACCURACY_LEVEL] = ir.AttrInt64(ACCURACY_LEVEL, _FLOAT32_ACTIVATIONS)
    return bool(rounding)
