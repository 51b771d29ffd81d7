"""The interface behind which every checkpoint format hides: names first, then one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]

# numpy has no bfloat16 of its own; ml_dtypes (which onnx-ir brings along) registers one.
DTYPES: dict[str, np.dtype[np.generic]] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}
FLOATING = frozenset({"float64", "float32", "float16", "bfloat16"})


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before its data is read.

    Args:
        name: the tensor's name in the source that lists it.
        dtype: a key of :data:`DTYPES`.
        shape: its dimensions.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@runtime_checkable
class TensorSource(Protocol):
    """A set of named tensors that are read one at a time.

    Listing is cheap and reads no data. ``read`` returns a fresh or a read-only (memory-mapped) array;
    the source keeps no reference to it, so that memory never exceeds one tensor.
    """

    def names(self) -> Sequence[str]:
        """All names, in the order in which they lie on disk."""
        ...

    def info(self, name: str) -> TensorInfo:
        """Type and shape of one tensor; KeyError for an unknown name."""
        ...

    def read(self, name: str) -> Array:
        """The data of one tensor."""
        ...
