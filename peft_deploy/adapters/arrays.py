"""Paddle tensors as numpy arrays and back, bfloat16 included. Needs Paddle."""

from __future__ import annotations

import numpy as np
import paddle

from peft_deploy.weights.source import DTYPES, Array

_BFLOAT16 = DTYPES["bfloat16"]


def dtype_name(tensor: paddle.Tensor) -> str:
    """The element type under its numpy name, as in ``"float32"``."""
    return str(tensor.dtype).rpartition(".")[2]


def to_array(tensor: paddle.Tensor) -> Array:
    """A copy of a tensor's values on the host."""
    values: Array = tensor.detach().numpy()
    # Paddle hands bfloat16 out as its bit patterns.
    return values.view(_BFLOAT16) if dtype_name(tensor) == "bfloat16" else values


def assign(tensor: paddle.Tensor, values: Array) -> None:
    """Puts values in place of a tensor's own, cast to its type; the tensor object stays."""
    dtype = dtype_name(tensor)
    cast = np.ascontiguousarray(values.astype(DTYPES[dtype], copy=False))
    tensor.set_value(cast.view(np.uint16) if dtype == "bfloat16" else cast)


def to_tensor(values: Array) -> paddle.Tensor:
    """A new tensor with the array's values and type."""
    if values.dtype == _BFLOAT16:
        return paddle.to_tensor(np.ascontiguousarray(values).view(np.uint16), dtype="bfloat16")
    return paddle.to_tensor(np.ascontiguousarray(values))
