"""Weights in blocks of small whole numbers with a scale each, as onnxruntime's MatMulNBits reads them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from peft_deploy.config.precision import CALIBRATED_BITS
from peft_deploy.environment import require_onnxruntime
from peft_deploy.errors import CheckpointError
from peft_deploy.weights.blocks import contiguous
from peft_deploy.weights.scale_search import search_scales
from peft_deploy.weights.source import Array, TensorInfo

MATMUL = "MatMulNBits"  # onnxruntime's operator
BLOCK = 32  # numbers that share a scale
QUANTIZED, SCALES = ".quantized", ".scales"  # what the file gets in place of a tensor
TABLE = ".table"  # behind the former, where a graph reads the same bytes in another shape
_COLUMNS = 1024  # quantized at a time: of a matrix with 11008 rows, 45 MB in float32


Floats = npt.NDArray[np.float32]
# Of a matrix [in, columns] with whole blocks: numbers and scales.
Quantizer = Callable[[Floats], tuple[Array, Array]]


@dataclass(frozen=True)
class BlockQuantized:
    """w = scale · (q - 2^(bits-1)), one scale for 32 numbers of a column, no zero points.

    Without ``importance`` numbers are rounded to nearest. On SmolLM2-135M (512 tokens, embeddings and head in 8 bits)
    that gives a KL divergence of 0.26 and a perplexity 17 % above that of float32. Others that look at weights alone
    gain little: zero points 0.25 (20 %), scales of least squares 0.27 (19 %), both 0.23 (19 %). With importance scales
    are searched (:mod:`~peft_deploy.weights.scale_search`): 0.15 (5 %); zero points would make that 0.14 (4 %).

    Args:
        bits: of a number, 4 or 8.
        rows: of a table whose rows are looked up, and whose transpose a head multiplies by: a block is a part of a
            row. Of a linear layer's matrix [in, out] it is a part of a column.
        importance: mean square of each input, float32 [in], for numbers of 4 bits. Layers that are put side by side
            read the same input, so that it makes no two ways to keep a tensor of one.
    """

    bits: int
    rows: bool = False
    importance: Floats | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.importance is not None and self.bits != CALIBRATED_BITS:
            raise ValueError(
                f"scales are searched for {CALIBRATED_BITS} bits, not for {self.bits}"
            )

    @property
    def name(self) -> str:
        """``int4`` or ``int8``."""
        return f"int{self.bits}"

    @property
    def axis(self) -> int:
        """Across the blocks."""
        return 0 if self.rows else 1

    def parts(self, info: TensorInfo) -> Mapping[str, TensorInfo]:
        """The numbers [out, blocks, bytes of a block], and the scales [out, blocks]."""
        size, out = self._sizes(info.shape)
        blocks = -(-size // BLOCK)
        packed = (out, blocks, BLOCK * self.bits // 8)
        return {
            QUANTIZED: TensorInfo(QUANTIZED, "uint8", packed),
            SCALES: TensorInfo(SCALES, "float32", (out, blocks)),
        }

    def encode(self, tensor: Array, name: str) -> Mapping[str, Array]:
        """See :meth:`~peft_deploy.weights.storage.Storage.encode`.

        Raises:
            CheckpointError: there is a number that is not finite.
        """
        parts = self.parts(TensorInfo(name, "float32", tensor.shape))
        packed = np.empty(parts[QUANTIZED].shape, np.uint8)
        scales = np.empty(parts[SCALES].shape, np.float32)
        quantize = self._searching(tensor.shape) or _quantizer(self.bits)
        for columns, block in self._column_blocks(tensor):
            if not np.isfinite(block).all():
                raise CheckpointError(
                    f"{name} holds NaN or infinite values, which {self.name} cannot keep"
                )
            packed[columns], scales[columns] = quantize(block)
        if not np.isfinite(scales).all():
            raise CheckpointError(f"{name} holds values that are too large for {self.name}")
        return {QUANTIZED: packed, SCALES: scales}

    def decode(self, parts: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
        """See :meth:`~peft_deploy.weights.storage.Storage.decode`."""
        size, out = self._sizes(shape)
        result = np.empty(shape, np.float32)
        for start in range(0, out, _COLUMNS):
            columns = slice(start, min(start + _COLUMNS, out))
            scales = parts[SCALES][columns].astype(np.float32)
            numbers = self._unpacked(parts[QUANTIZED][columns])  # [columns, blocks, 32]
            values = (numbers * scales[..., None]).reshape(len(scales), -1)[:, :size]
            if self.rows:
                result[columns] = values
            else:
                result[:, columns] = values.T
        return result

    def _searching(self, shape: tuple[int, ...]) -> Quantizer | None:
        if self.importance is None:
            return None
        size, _ = self._sizes(shape)
        if self.importance.shape != (size,):
            raise ValueError(f"{size} inputs, and importance {list(self.importance.shape)}")
        padded = np.pad(self.importance, (0, -size % BLOCK))
        return lambda block: search_scales(block, padded, BLOCK)

    def _unpacked(self, packed: Array) -> Floats:
        """The whole numbers around 0; of a byte with two of them, the lower half is the first."""
        zero = np.float32(2 ** (self.bits - 1))
        if self.bits == 8:
            return packed.astype(np.float32) - zero
        bytes_: npt.NDArray[Any] = packed
        numbers = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.float32)
        numbers[..., 0::2], numbers[..., 1::2] = bytes_ & 0xF, bytes_ >> 4
        return numbers - zero

    def _column_blocks(self, tensor: Array) -> Iterator[tuple[slice, Floats]]:
        """Some columns [in, columns] at a time, [in] filled up with zeros to whole blocks."""
        size, out = self._sizes(tensor.shape)
        for start in range(0, out, _COLUMNS):
            columns = slice(start, min(start + _COLUMNS, out))
            part = tensor[columns].T if self.rows else tensor[:, columns]
            block = contiguous(part).astype(np.float32, copy=False)
            yield columns, np.pad(block, ((0, -size % BLOCK), (0, 0))) if size % BLOCK else block

    def _sizes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Along the blocks, and across them."""
        if len(shape) != 2:
            raise ValueError(f"a matrix can be kept as {self.name}, and not {list(shape)}")
        return (shape[1], shape[0]) if self.rows else (shape[0], shape[1])


@functools.cache
def _quantizer(bits: int) -> Quantizer:
    """Onnxruntime's own, which rounds to the nearest."""
    require_onnxruntime("quantizing weights")
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        DefaultWeightOnlyQuantizer,
    )

    for handler in [h for h in root.handlers if h not in before]:  # the import configures logging
        root.removeHandler(handler)
    root.setLevel(level)
    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, bits=bits)
    quantizer = DefaultWeightOnlyQuantizer(config)

    def quantize(matrix: Floats) -> tuple[Array, Array]:
        packed, scales, _ = quantizer.qbits_block_quant(matrix)
        return packed, scales

    return quantize
