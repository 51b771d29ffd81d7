"""Where heads stand: after the tokens, as projections give them, or before, as matrix products take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

HEADS_FIRST = (0, 2, 1, 3)  # [B, S, H, D] → [B, H, S, D], and back


@dataclass(frozen=True)
class HeadsLast:
    """Where heads first came from.

    Args:
        flat: [B, S, H * D]; None where there is only ``split``.
        split: [B, S, H, D].
        sizes: what ``flat`` was reshaped with, if it was.
        heads: H.
    """

    flat: ir.Value | None
    split: ir.Value
    sizes: ir.Value | None
    heads: int


def heads_last(value: ir.Value | None) -> HeadsLast | None:
    """What a value [B, H, S, D] was before its heads were brought forward; None when it was no such thing."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Transpose" or ints(node, "perm") != HEADS_FIRST:
        return None
    split = node.inputs[0]
    reshape = None if split is None else split.producer()
    if split is None:
        return None
    if reshape is not None and reshape.op_type == "Reshape":
        flat, given = reshape.inputs
        sizes = constant_ints(given)
        if sizes is not None and len(sizes) == 4 and sizes[:2] == (0, 0) and sizes[2] > 0:
            ranked = flat is not None and flat.shape is not None and len(flat.shape) == 3
            return HeadsLast(flat if ranked else None, split, given, sizes[2])
    heads = size(split, 2) if split.shape is not None and len(split.shape) == 4 else None
    return None if heads is None else HeadsLast(None, split, None, heads)


def numbers(op: Any, values: tuple[int, ...]) -> ir.Value:
    """An initializer of int64, named after what it holds."""
    name = "sizes_" + "_".join(str(value).replace("-", "m") for value in values)
    made: ir.Value = op.initializer(ir.tensor(np.array(values, np.int64)), name=name)
    return made


def size(value: ir.Value, axis: int) -> int | None:
    """One dimension of a value, where it is known."""
    shape = value.shape
    if shape is None or not -len(shape) <= axis < len(shape):
        return None
    found = shape[axis]
    return found if isinstance(found, int) else None


def ints(node: ir.Node, attribute: str) -> tuple[int, ...] | None:
    """A node's attribute of integers."""
    found = node.attributes.get(attribute)
    return None if found is None else tuple(found.as_ints())


def constant_ints(value: ir.Value | None) -> tuple[int, ...] | None:
    """The integers that a constant holds; None for anything else."""
    constant = None if value is None else value.const_value
    if constant is None or not constant.dtype.is_integer():
        return None
    return tuple(int(number) for number in constant.numpy().reshape(-1))
