"""LoRA's arithmetic on plain arrays, in Paddle's layout: W [in, out], A [in, R], B [R, out].

The one place that says what merging means: W + scaling · A · B, accumulated in float32 (in
float64 where W or the result is float64) and rounded once to the result's type.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from peft_deploy.errors import AdapterError
from peft_deploy.weights.blocks import BAND_ROWS, fill, row_blocks
from peft_deploy.weights.cast import all_finite, check_float, is_float, round_into
from peft_deploy.weights.pieces import Task, in_order
from peft_deploy.weights.scratch import Scratch
from peft_deploy.weights.source import DTYPES, Array

_exact, _base = Scratch(), Scratch()  # what lies between two steps, a band of rows


@dataclass(frozen=True)
class LoraPair:
    """The two factors of one layer's change, and the number that they are multiplied by.

    Args:
        A: [in, R], any floating-point type.
        B: [R, out], any floating-point type.
        scaling: alpha / r, or what the adapter's variant makes of it.

    Raises:
        AdapterError: the factors do not fit each other, or the scaling is not a finite number.
    """

    A: Array
    B: Array
    scaling: float

    def __post_init__(self) -> None:
        a, b = self.A.shape, self.B.shape
        if len(a) != 2 or len(b) != 2 or a[1] != b[0] or a[1] < 1:
            raise AdapterError(
                f"A {list(a)} and B {list(b)} do not fit: "
                "A has to be [in, R] and B [R, out], with a rank R of at least 1"
            )
        if not is_float(self.A) or not is_float(self.B):
            raise AdapterError(
                "A and B have to be of a floating-point type, "
                f"not {self.A.dtype} and {self.B.dtype}"
            )
        if not math.isfinite(self.scaling):
            raise AdapterError(f"the scaling is {self.scaling}; it has to be a finite number")

    @property
    def rank(self) -> int:
        """R."""
        return int(self.A.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight that the pair belongs to: (in, out)."""
        return int(self.A.shape[0]), int(self.B.shape[1])

    def transposed(self) -> LoraPair:
        """The change of the transposed weight."""
        return LoraPair(self.B.T, self.A.T, self.scaling)


def lora_delta(pair: LoraPair) -> Array:
    """The change of the weight, scaling · A · B.

    Returns:
        [in, out], float32; float64 when A or B is.
    """
    wide = np.float64 if np.float64 in (pair.A.dtype, pair.B.dtype) else np.float32
    delta: npt.NDArray[Any] = pair.A.astype(wide) @ pair.B.astype(wide)
    delta *= wide(pair.scaling)
    return delta


def merge_weight(
    W: Array, pair: LoraPair, *, name: str = "the weight", dtype: str | None = None
) -> Array:
    """The merged weight, W + scaling · A · B.

    Works in blocks of rows, so that beyond the result only a few megabytes are needed.

    Args:
        W: [in, out], floating-point, in any memory order; not changed.
        pair: the factors.
        name: the tensor's name, for errors.
        dtype: type of the result, a key of :data:`~peft_deploy.weights.source.DTYPES`; W's when
            None.

    Returns:
        [in, out], a new array in row-major order.

    Raises:
        AdapterError: W has another shape or is not floating-point, or A, B or the result holds a
            NaN or an infinity.
    """
    merged = np.empty(W.shape, W.dtype if dtype is None else DTYPES[check_float(dtype)])
    start = 0
    for block in in_order(merged_pieces(W, pair, name=name, dtype=dtype)):
        merged[start : start + len(block)] = block
        start += len(block)
    return merged


def merged_pieces(
    W: Array,
    pair: LoraPair,
    *,
    name: str = "the weight",
    dtype: str | None = None,
    height: int | None = None,
) -> Iterator[Task[Array]]:
    """The merged weight's rows in pieces: taken with :func:`~peft_deploy.weights.pieces.in_order`, which gives a
    product one thread, bit for bit those of :func:`merge_weight`.

    Args:
        W: see there, as all others.
        pair: likewise.
        name: likewise.
        dtype: likewise.
        height: rows of a piece; a few megabytes when None.

    Raises:
        AdapterError: likewise.
    """
    if W.shape != pair.shape or not is_float(W):
        raise AdapterError(
            f"{name}: the weight is {W.dtype.name} {list(W.shape)}, "
            f"the adapter changes a floating-point weight {list(pair.shape)}"
        )
    target = W.dtype if dtype is None else DTYPES[check_float(dtype)]
    wide = np.float64 if np.float64 in (W.dtype, target) else np.float32
    A: npt.NDArray[Any] = require_finite(pair.A, f"A of {name}").astype(wide)  # [in, R]
    B: npt.NDArray[Any] = require_finite(pair.B, f"B of {name}").astype(wide)  # [R, out]

    def merge(rows: slice) -> Array:
        merged = np.empty((rows.stop - rows.start, W.shape[1]), target)
        for start in range(0, len(merged), BAND_ROWS):
            band = slice(start, start + BAND_ROWS)
            _merge_band(W[rows][band], A[rows][band], B, pair.scaling, merged[band], name)
        return merged

    for rows in row_blocks(W.shape, np.dtype(wide).itemsize, height):
        yield partial(merge, rows)


def _merge_band(
    W: Array,
    A: npt.NDArray[Any],
    B: npt.NDArray[Any],
    scaling: float,
    merged: Array,
    name: str,
) -> None:
    """Fills ``merged`` with some rows of the result."""
    wide = A.dtype
    exact = merged if merged.dtype == wide else _exact.array(merged.shape, wide)
    base = _base.array(W.shape, wide)
    with np.errstate(over="ignore", invalid="ignore"):
        fill(base, W)
        np.matmul(A, B, out=exact)
        np.multiply(exact, wide.type(scaling), out=exact)
        np.add(exact, base, out=exact)
        if exact is not merged:
            round_into(merged, exact)
    if all_finite(merged):
        return
    if not np.isfinite(W).all():
        raise AdapterError(f"{name}: the base weight itself holds a NaN or an infinity")
    raise AdapterError(
        f"{name}: the merged weight is not finite in {merged.dtype.name}",
        hint="its values or its scaling are too large; or merge into bfloat16 or float32",
    )


def require_finite(array: Array, name: str) -> Array:
    """The array itself.

    Raises:
        AdapterError: it holds a NaN or an infinity; the message counts them.
    """
    bad = array.size - int(np.isfinite(array).sum()) if is_float(array) else 0
    if bad:
        raise AdapterError(
            f"{name} holds {bad} values that are NaN or infinite",
            hint="the training that wrote this adapter diverged",
        )
    return array
