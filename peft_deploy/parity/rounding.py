"""The reference as 16 bits would have it: what modules take and give rounded, the rest as it was. Needs Paddle.

Paddle has no 16-bit kernels for most operators on the CPU, so the arithmetic itself stays in float32. What 16-bit
hardware does is close to that: it multiplies and sums in float32, and rounds what it writes back.
"""

from __future__ import annotations

from peft_deploy.environment import require_paddle

require_paddle("the reference side of a parity check")

import math
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import paddle
from paddle import nn

_FLOATS = (paddle.float32, paddle.float64)
# What some modules hand on among their results is a mask, which a bundle keeps in float32 or clips.
_MASK = -1e8


@contextmanager
def rounded_modules(
    model: nn.Layer, dtype: str, peaks: MutableMapping[str, float]
) -> Iterator[None]:
    """Rounds what every module takes and gives to a 16-bit type, for the time of the block.

    What goes into a module may be a sum or a product that no module has given, such as a residual.

    Args:
        model: whose modules, itself included.
        dtype: ``float16`` or ``bfloat16``.
        peaks: module → the largest magnitude that went in or came out, before rounding; grows.
    """
    hooks = []
    for name, layer in model.named_sublayers(include_self=True):
        hooks.append(layer.register_forward_pre_hook(_entering(name, dtype, peaks)))
        hooks.append(layer.register_forward_post_hook(_rounding(name, dtype, peaks)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _entering(name: str, dtype: str, peaks: MutableMapping[str, float]) -> Any:
    def round_input(_layer: nn.Layer, inputs: Any) -> Any:
        if isinstance(inputs, tuple) and len(inputs) == 1:  # a composite's have masks among them
            return (_rounded(inputs[0], name, dtype, peaks),)
        return None

    return round_input


def _rounding(name: str, dtype: str, peaks: MutableMapping[str, float]) -> Any:
    def round_result(_layer: nn.Layer, _inputs: Any, result: Any) -> Any:
        return _rounded(result, name, dtype, peaks)

    return round_result


def _rounded(result: Any, name: str, dtype: str, peaks: MutableMapping[str, float]) -> Any:
    if isinstance(result, paddle.Tensor):
        _note(result, name, peaks)
        if result.dtype not in _FLOATS or not result.size:
            return result
        rounded = result.cast(dtype).cast(result.dtype)
        masked = result <= _MASK
        return paddle.where(masked, result, rounded) if bool(masked.any()) else rounded
    if isinstance(result, (list, tuple)):
        parts = [_rounded(part, name, dtype, peaks) for part in result]
        return type(result)(*parts) if hasattr(result, "_fields") else type(result)(parts)
    if isinstance(result, dict):
        for key in list(result):
            result[key] = _rounded(result[key], name, dtype, peaks)
    return result


def _note(value: Any, name: str, peaks: MutableMapping[str, float]) -> None:
    if isinstance(value, paddle.Tensor) and value.dtype in _FLOATS and value.size:
        numbers = paddle.where(value <= _MASK, paddle.zeros_like(value), value)
        peak = float(numbers.abs().max())
        peaks[name] = peak if math.isnan(peak) else max(peaks.get(name, 0.0), peak)
