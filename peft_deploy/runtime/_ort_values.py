"""Between numpy arrays and onnxruntime's values, and between its type names and numpy's."""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING

import numpy as np

from peft_deploy.errors import ExecutionError
from peft_deploy.runtime.runner import Array

if TYPE_CHECKING:
    import onnxruntime as ort

# onnxruntime's name of a tensor type → numpy's name of the element type.
_NUMPY_NAMES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int16)": "int16",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}
_ONNX_BFLOAT16 = 16  # TensorProto.DataType


def numpy_name(ort_type: str, where: str) -> str:
    """Numpy's name of one of onnxruntime's tensor types.

    Raises:
        ExecutionError: a type that no runner here takes, such as a sequence or text.
    """
    try:
        return _NUMPY_NAMES[ort_type]
    except KeyError:
        raise ExecutionError(
            f"{where} is a {ort_type}; only {', '.join(_NUMPY_NAMES)} can be used"
        ) from None


def to_ort(array: Array, device: str) -> ort.OrtValue:
    """The array as a value on a device; on the CPU it shares the array's memory."""
    import onnxruntime as ort

    array = np.ascontiguousarray(array)
    if array.dtype.name == "bfloat16":  # onnxruntime takes only numpy's own types
        bits = array.view(np.uint16)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _ONNX_BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array, device)


def to_numpy(value: ort.OrtValue) -> Array:
    """The value as an array; a value that lies on the CPU is not copied, unless it is bfloat16."""
    if value.data_type() != "tensor(bfloat16)":
        array: Array = value.numpy()
        return array
    import ml_dtypes

    if value.device_name().lower() != "cpu":
        raise ExecutionError(
            f"a bfloat16 output lies on {value.device_name()}; outputs must be bound to the CPU"
        )
    shape = tuple(value.shape())
    count = math.prod(shape)
    if count == 0:
        return np.zeros(shape, ml_dtypes.bfloat16)
    memory = (ctypes.c_uint16 * count).from_address(value.data_ptr())
    bits = np.frombuffer(memory, np.uint16).copy()  # the memory goes with the value
    numbers: Array = bits.view(ml_dtypes.bfloat16).reshape(shape)
    return numbers
