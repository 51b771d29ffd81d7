"""PiSSA's starting point: the principal part of a weight as A and B, and what is left of the
weight.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np

from peft_deploy.errors import AdapterError
from peft_deploy.weights.source import Array, TensorInfo, TensorSource


@dataclass(frozen=True)
class PrincipalSplit:
    """``weight = residual + A @ B``, up to the rounding of the weight's type.

    Args:
        A: [in, R] float32.
        B: [R, out] float32.
        residual: [in, out] in the weight's type.
    """

    A: Array
    B: Array
    residual: Array


def principal_split(weight: Array, rank: int) -> PrincipalSplit:
    """Splits a matrix by its ``rank`` largest singular values (arXiv 2404.02948, equations 2 to
    4).

    A and B are unique up to signs, their product is unique; so the residual can be computed again
    from the original weight wherever the trained A and B are to be used.

    Args:
        weight: [in, out], of any floating type; the arithmetic is done in float32.
        rank: R, at most min(in, out).

    Raises:
        AdapterError: the rank is larger than the matrix has, or the weight is not finite.
    """
    matrix = weight.astype(np.float32)
    if rank > min(matrix.shape):
        raise AdapterError(
            f"PiSSA of rank {rank} does not fit a weight of shape {list(matrix.shape)}; "
            f"the rank can be at most {min(matrix.shape)}"
        )
    if not np.isfinite(matrix).all():
        raise AdapterError("PiSSA cannot start from a weight that holds NaN or infinity")
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    root = np.sqrt(values[:rank])
    A = left[:, :rank] * root  # [in, R]
    B = root[:, None] * right[:rank]  # [R, out]
    return PrincipalSplit(A, B, (matrix - A @ B).astype(weight.dtype))


class WithoutPrincipalPart:
    """A base model's tensors where the adapted weights have given up their principal part.

    Args:
        source: the base model's tensors as they were before training.
        modules: the adapted modules.
        rank: R.
    """

    def __init__(self, source: TensorSource, modules: Set[str], rank: int) -> None:
        self._source = source
        self._split = {f"{module}.weight" for module in modules}
        self._rank = rank

    def names(self) -> Sequence[str]:
        """The source's names."""
        return self._source.names()

    def info(self, name: str) -> TensorInfo:
        """The source's type and shape."""
        return self._source.info(name)

    def read(self, name: str) -> Array:
        """One tensor; of an adapted weight, what PiSSA leaves of it, in float32."""
        weight = self._source.read(name)
        if name not in self._split:
            return weight
        return principal_split(weight.astype(np.float32), self._rank).residual
