"""Masks in 16 bits.

A mask adds float32's lowest number to the scores that do not count, which float16 cannot hold: it would be minus
infinity, and a row of padding, where nothing counts, not a number.
"""

from __future__ import annotations

import onnx_ir as ir

# Softmax makes exactly 0 of it, and a score of up to 32736 can be added before float16 overflows.
LOWEST = -32768.0


def is_plain_mask(mask: ir.Value) -> bool:
    """Whether a value adds nothing but 0 or a very low number.

    What depends on positions, such as the slopes of ALiBi or the table of T5, needs more digits than float16 has at
    such magnitudes. It comes from a table or a weight, and a plain mask from truth values and single numbers.

    Args:
        mask: what is added to the scores.
    """
    seen: set[ir.Value] = set()
    waiting = [mask]
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        tensor, producer = value.const_value, value.producer()
        if tensor is not None and not value.is_graph_input():
            if tensor.dtype.is_floating_point() and tensor.size > 1:
                return False
            continue
        if producer is not None:
            if producer.op_type == "CumSum":
                return False
            waiting += [v for v in producer.inputs if v is not None]
    return True
