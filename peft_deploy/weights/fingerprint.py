"""A short name for a set of weights, the same for every form in which they may be stored.

The sample is an evenly spaced grid: so many rows, so many columns, both including the first and
the last. A matrix and its stored transpose give the same grid, and only a few pages of a mapped
file are touched.
"""

from __future__ import annotations

import hashlib

import numpy as np

from peft_deploy.weights._mapped import read_sparsely
from peft_deploy.weights.grid import elements_per_axis
from peft_deploy.weights.source import FLOATING, Array, TensorSource

SAMPLED_ELEMENTS = 1024


def fingerprint(source: TensorSource) -> str:
    """The sha256 over names, shapes and a sample of up to 1024 float32 values of each tensor.

    It identifies weights; it does not prove that every byte is intact.

    Returns:
        64 hexadecimal digits. Independent of the order of the tensors, the files they are in and,
        up to rounding, the floating-point type.
    """
    digest = hashlib.sha256()
    for name in sorted(source.names()):
        info = source.info(name)
        kind = "float" if info.dtype in FLOATING else info.dtype
        digest.update(f"{name} {kind} {list(info.shape)}\n".encode())
        array = source.read(name)
        read_sparsely(array)
        digest.update(sample(array).tobytes())
    return digest.hexdigest()


def sample(array: Array) -> Array:
    """Up to 1024 evenly spaced elements; of floats as float32, in row-major order of the grid."""
    per_axis = elements_per_axis(array.shape, SAMPLED_ELEMENTS)
    picked = array[np.ix_(*(_spaced(n, k) for n, k in zip(array.shape, per_axis, strict=True)))]
    if array.dtype.kind in "biu":
        return np.ascontiguousarray(picked)
    return np.ascontiguousarray(picked, dtype=np.float32)


def _spaced(length: int, count: int) -> Array:
    return np.linspace(0, max(0, length - 1), count).round().astype(np.int64)
