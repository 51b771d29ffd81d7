"""Rotary position embedding (opset 23), which gathers by position from a table of cosines and one of sines.

The operator refuses positions outside of the tables, negative ones included.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter.pattern import MatchResult, RewriteRule

from peft_deploy.convert.fusions.fusion import RuleFusion
from peft_deploy.convert.fusions.heads import HEADS_FIRST, constant_ints, heads_last, numbers, size

_LAST = 3  # the axis of a head's dimensions, x being [B, H, S, D]


@dataclass(frozen=True)
class _Rotation:
    """What the operator needs to know.

    Args:
        cos: [positions, pairs].
        sin: likewise.
        positions: [B, S].
        head_dim: D.
        rotated: 2 * pairs; the dimensions beyond stay as they are.
        interleaved: neighbours are paired, not the two halves.
    """

    cos: ir.Value
    sin: ir.Value
    positions: ir.Value
    head_dim: int
    rotated: int
    interleaved: bool

    def apply(self, op: Any, x: ir.Value) -> ir.Value:
        """Rotates x [B, H, S, D]; before its heads are brought forward, where they are."""
        given = [self.cos, self.sin, self.positions]
        attributes = {"interleaved": int(self.interleaved)}
        if self.rotated != self.head_dim:
            attributes["rotary_embedding_dim"] = self.rotated
        origin = heads_last(x)
        if origin is None:
            turned: ir.Value = op.RotaryEmbedding(x, *given, **attributes)
            return turned
        flat = origin.flat or op.Reshape(origin.split, numbers(op, (0, 0, -1)))
        turned = op.RotaryEmbedding(flat, *given, num_heads=origin.heads, **attributes)
        turned.shape = flat.shape if flat.shape is not None else ir.Shape([None] * 3)
        sizes = origin.sizes or numbers(op, (0, 0, origin.heads, self.head_dim))
        first: ir.Value = op.Transpose(op.Reshape(turned, sizes), perm=HEADS_FIRST)
        return first


class _Form(ABC):
    """A way of writing rotations."""

    def rule(self) -> RewriteRule:
        """The rewrite rule for it."""
        return RewriteRule(self.pattern, self.rewrite, self.check)

    # Its arguments are the pattern's variables, by whose names they are found again.
    pattern: Callable[..., Any]

    @abstractmethod
    def rotation(self, **found: ir.Value) -> _Rotation | str:
        """What the pattern's values say; or why they do not fit the operator."""

    def check(self, context: Any, **found: Any) -> MatchResult:
        """The values fit the operator."""
        result, rotation = MatchResult(), self.rotation(**found)
        return result.fail(rotation) if isinstance(rotation, str) else result

    def rewrite(self, op: Any, x: ir.Value, **found: Any) -> Any:
        """See :class:`_Rotation`."""
        rotation = self.rotation(x=x, **found)
        assert isinstance(rotation, _Rotation)  # the check has passed
        return rotation.apply(op, x)


class _Halves(_Form):
    """Dimension i is paired with i + D/2 (the Llama convention)."""

    def pattern(self, op: Any, x: Any, cos: Any, sin: Any) -> Any:
        """What ``RotaryTable.rotate`` is converted to."""
        first, second = op.Split(
            x,
            axis=_LAST,
            _outputs=["first", "second"],
            _allow_other_inputs=True,
            _allow_other_attributes=True,
        )
        return op.Concat(
            op.Sub(op.Mul(first, cos), op.Mul(second, sin)),
            op.Add(op.Mul(second, cos), op.Mul(first, sin)),
            axis=_LAST,
        )

    def rotation(self, **found: ir.Value) -> _Rotation | str:
        """See :class:`_Form`."""
        head_dim, split = size(found["x"], _LAST), found["first"].producer()
        assert split is not None
        if head_dim is None or head_dim % 2:
            return "the heads are not known to have two halves"
        # Up to opset 17 the sizes are an input; since, two parts may be asked for.
        if len(split.inputs) > 1 and constant_ints(split.inputs[1]) != (head_dim // 2,) * 2:
            return "the heads are not split into halves"
        cos, sin = _gathered(found["cos"]), _gathered(found["sin"])
        return _rotation(cos, sin, head_dim, head_dim, interleaved=False)


class _Neighbours(_Form):
    """Dimensions 2i and 2i + 1 are paired (the convention of GLM)."""

    def pattern(self, op: Any, x: Any, partner: Any, cos: Any, sin: Any) -> Any:
        """What ``NeighbourRotaryTable.rotate`` is converted to where all of a head is rotated."""
        return op.Add(op.Mul(x, cos), op.Mul(op.Gather(x, partner, axis=-1), sin))

    def rotation(self, **found: ir.Value) -> _Rotation | str:
        """See :class:`_Form`."""
        head_dim = size(found["x"], _LAST)
        partner = constant_ints(found["partner"])
        if partner is None or head_dim != len(partner):
            return "the pairs do not cover the heads"
        return _neighbours(partner, found["cos"], found["sin"], head_dim)


class _FirstNeighbours(_Form):
    """The same where the last dimensions of a head are not rotated."""

    def pattern(self, op: Any, x: Any, sizes: Any, partner: Any, cos: Any, sin: Any) -> Any:
        """What ``NeighbourRotaryTable.rotate`` is converted to otherwise."""
        part, rest = op.Split(x, sizes, axis=_LAST, _outputs=2)
        crossed = op.Mul(op.Gather(part, partner, axis=-1), sin)
        return op.Concat(op.Add(op.Mul(part, cos), crossed), rest, axis=_LAST)

    def rotation(self, **found: ir.Value) -> _Rotation | str:
        """See :class:`_Form`."""
        parts, partner = constant_ints(found["sizes"]), constant_ints(found["partner"])
        if parts is None or len(parts) != 2 or partner is None or len(partner) != parts[0]:
            return "the pairs do not cover the part of the heads that is rotated"
        return _neighbours(partner, found["cos"], found["sin"], sum(parts))


@dataclass(frozen=True)
class _Gathered:
    """Rows of a table [positions, pairs] by position."""

    table: ir.Value
    positions: ir.Value


def _gathered(value: ir.Value | None) -> _Gathered | None:
    """Where a value [B, 1, S, pairs] is from."""
    widened = None if value is None else value.producer()
    if widened is None or widened.op_type != "Unsqueeze":
        return None
    rows = widened.inputs[0]
    gather = None if rows is None else rows.producer()
    if constant_ints(widened.inputs[1]) != (1,) or gather is None or gather.op_type != "Gather":
        return None
    axis = gather.attributes.get("axis")
    table, positions = gather.inputs
    if table is None or positions is None or (axis is not None and axis.as_int() != 0):
        return None
    return _Gathered(table, positions)


def _rotation(
    cos: _Gathered | None, sin: _Gathered | None, head_dim: int, rotated: int, *, interleaved: bool
) -> _Rotation | str:
    if cos is None or sin is None:
        return "cos and sin are not gathered from tables by position"
    if cos.positions is not sin.positions:
        return "cos and sin are not of the same positions"
    if cos.positions.shape is None or len(cos.positions.shape) != 2:
        return "positions are not known to be [batch, sequence]"
    for table in (cos.table, sin.table):
        constant = table.const_value
        if constant is None or len(constant.shape) != 2 or constant.shape[1] != rotated // 2:
            return "the tables of cos and sin do not have a column a pair"
    return _Rotation(cos.table, sin.table, cos.positions, head_dim, rotated, interleaved)


def _neighbours(
    partner: tuple[int, ...], cos: ir.Value, sin: ir.Value, head_dim: int
) -> _Rotation | str:
    """The rotation if every second dimension goes with the one before it, with cos and sin of its pair."""
    place, signed = np.arange(len(partner)), sin.producer()
    if len(partner) % 2 or partner != tuple(place ^ 1):
        return "the pairs are not of neighbours"
    if signed is None or signed.op_type != "Mul":
        return "sin has no signs"
    spread_sin, sign = signed.inputs
    signs = None if sign is None or sign.const_value is None else sign.const_value.numpy()
    if signs is None or signs.tolist() != np.where(place % 2, 1, -1).tolist():
        return "sin is not taken from the first and added to the second of a pair"
    pairs = tuple(place // 2)
    cosines, sines = (_gathered(_spread(value, pairs)) for value in (cos, spread_sin))
    return _rotation(cosines, sines, head_dim, len(partner), interleaved=True)


def _spread(value: ir.Value | None, pairs: tuple[int, ...]) -> ir.Value | None:
    """What a value was before each of its columns was doubled."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Gather" or constant_ints(node.inputs[1]) != pairs:
        return None
    axis = node.attributes.get("axis")
    return node.inputs[0] if axis is not None and axis.as_int() in (-1, _LAST) else None


# Before the other: the rotated part of a head looks like a whole one.
PARTIAL_ROTARY_EMBEDDING = RuleFusion("RotaryEmbedding", [_FirstNeighbours().rule()])
ROTARY_EMBEDDING = RuleFusion("RotaryEmbedding", [_Halves().rule(), _Neighbours().rule()])
