"""The weights in a bundle's files against those that the export makes of the checkpoint, byte by byte.

The cases of a check read a few texts, so they see neither a row of an embedding whose token is in none of them, nor a
position between the texts and the end of a table. Comparing the files themselves leaves no such gap.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from peft_deploy.errors import BundleError
from peft_deploy.runtime import check_external_data
from peft_deploy.runtime.program_file import check_weights
from peft_deploy.weights import FLOATING, Array, TensorInfo
from peft_deploy.weights.pdiparams import read_places

# Of a tensor's largest magnitude. Another processor adds up A · B in another order (and decomposes a matrix in
# another way, for PiSSA), so that a merged weight may differ in its last bits.
SAME_SUM = 1e-5
# Of the numbers of a tensor in 8 or 16 bits: a sum that lies between two steps may be rounded to either.
# Such a choice changes a byte, or the two numbers in it, by one.
SAME_STEPS, ONE_STEP = 1e-3, 0x11
# Of the scales that were chosen among several: where two are as good to the last bits, such a sum decides.
SAME_CHOICES = 5e-3
_FEW_BLOCKS = 4  # in any tensor, however small
_HASH_BLOCK = 1 << 20
_STEP = {"float16": 2.0**-10, "bfloat16": 2.0**-7}  # between neighbours, of the larger one
_TINY = 1e-38
_PIECE = 1 << 20  # elements that are compared at a time


@dataclass(frozen=True)
class FileTensor:
    """Where a bundle keeps a tensor.

    Args:
        name: of the initializer, or of the program's parameter.
        path: of the file.
        dtype: a key of :data:`~peft_deploy.weights.source.DTYPES`.
        shape: its dimensions.
        offset: of its first byte.
        length: in bytes.
        content: the bytes themselves, of a small tensor that lies in the graph's own file.
    """

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int
    content: bytes | None = None

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """A file that stands at its first byte."""
        if self.content is not None:
            yield BytesIO(self.content)
            return
        with self.path.open("rb") as file:
            file.seek(self.offset)
            yield file

    def sha256(self) -> str:
        """Of its bytes, in hexadecimal."""
        digest, left = hashlib.sha256(), self.length
        with self.open() as file:
            while left > 0 and (block := file.read(min(left, _HASH_BLOCK))):
                digest.update(block)
                left -= len(block)
        return digest.hexdigest()


def stored_in_onnx(model: Path) -> dict[str, FileTensor]:
    """Name → place of every initializer.

    Args:
        model: ``model.onnx``.

    Raises:
        BundleError: the file is no model, or keeps weights elsewhere.
    """
    import onnx_ir as ir

    check_external_data(model)
    found: dict[str, FileTensor] = {}
    for name, value in ir.load(model).graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            continue
        dtype, shape = tensor.dtype.numpy().name, tuple(tensor.shape.numpy())
        if isinstance(tensor, ir.ExternalTensor):
            path, offset, length = model.parent / tensor.location, tensor.offset, tensor.length
            found[name] = FileTensor(
                name, path, dtype, shape, offset or 0, length or tensor.nbytes
            )
        else:
            found[name] = FileTensor(name, model, dtype, shape, 0, tensor.nbytes, tensor.tobytes())
    return found


def stored_in_paddle(program: Path, params: Path) -> dict[str, FileTensor]:
    """Name → place of every parameter of a program in Paddle's static format.

    Args:
        program: ``model.json``.
        params: ``model.pdiparams``.

    Raises:
        BundleError: the two do not belong together.
    """
    names = check_weights(program, params).parameters
    return {
        name: FileTensor(name, params, info.dtype, info.shape, offset, info.nbytes)
        for name, (info, offset) in zip(names, read_places(params), strict=True)
    }


def difference(
    stored: FileTensor,
    wanted: TensorInfo,
    pieces: Iterable[Array],
    *,
    summed: bool,
    chosen: bool = False,
) -> str | None:
    """What is wrong with a stored tensor, for people; None when it is the one that is wanted.

    Args:
        stored: where it lies.
        wanted: type and shape of what an export writes.
        pieces: the same in row-major order, a few megabytes at a time.
        summed: whether it is a sum of products, whose last bits depend on the processor.
        chosen: whether it is of blocks whose scales were searched, which such bits can decide.

    Raises:
        BundleError: the file ends before the tensor does.
    """
    if (stored.dtype, stored.shape) != (wanted.dtype, wanted.shape):
        return f"it is {stored.dtype} {list(stored.shape)}; it should be {wanted.dtype} {list(wanted.shape)}"
    changed, first, off, largest = 0, -1, 0.0, 0.0
    others, explained = 0, True
    for start, have, want in _blocks(stored, pieces):
        if summed:
            largest = max(largest, float(np.abs(want.astype(np.float64)).max(initial=0)))
        unequal = _unequal(have, want)
        if unequal.size == 0:
            continue
        changed += unequal.size
        first = start + int(unequal[0]) if first < 0 else first
        gap = np.abs(have[unequal].astype(np.float64) - want[unequal].astype(np.float64))
        off = max(off, float(np.where(np.isnan(gap), np.inf, gap).max()))
        count, alike = _count_others(have[unequal], want[unequal])
        others, explained = others + count, explained and alike
    if first < 0 or (summed and _is_same_sum(wanted, off, max(largest, _TINY), changed)):
        return None
    if summed and chosen and explained and _are_few(others, wanted):
        return None
    index = [int(i) for i in np.unravel_index(first, wanted.shape)]
    return f"{changed} of {math.prod(wanted.shape)} numbers differ, by up to {off:.3g}; the first is {index}"


def _is_same_sum(wanted: TensorInfo, off: float, largest: float, changed: int) -> bool:
    """Whether another order of adding up explains a difference.

    Args:
        wanted: type and shape of what the export writes.
        off: the largest difference.
        largest: the largest magnitude.
        changed: how many numbers differ.
    """
    some = SAME_STEPS * math.prod(wanted.shape)
    if wanted.dtype not in FLOATING:
        return off <= ONE_STEP and changed <= some
    step = _STEP.get(wanted.dtype, 0.0)
    return off <= (SAME_SUM + step) * largest and (not step or changed <= some)


def _count_others(have: Array, want: Array) -> tuple[int, bool]:
    """How many numbers differ by more than a sum's last bits, and whether another choice of scales explains them.

    Args:
        have: scales, or bytes with numbers in blocks.
        want: likewise, all different.
    """
    if np.issubdtype(want.dtype, np.integer):
        return want.size, True
    mine, others = have.astype(np.float64), want.astype(np.float64)
    far = ~(np.abs(mine - others) <= SAME_SUM * np.abs(others))  # NaN is far, too
    ratios = mine[far] / np.where(others[far] == 0, np.inf, others[far])
    # The search's candidates are less than a factor of two apart.
    return int(far.sum()), bool(((ratios > 0.5) & (ratios < 2)).all())


def _are_few(count: int, wanted: TensorInfo) -> bool:
    """Whether so few numbers of searched blocks differ that the last bits of their weights explain it."""
    size = math.prod(wanted.shape)
    if wanted.dtype not in FLOATING:  # [out, blocks, bytes]
        return count <= max(_FEW_BLOCKS * wanted.shape[-1], SAME_STEPS * size)
    return count <= max(_FEW_BLOCKS, SAME_CHOICES * size)


def _unequal(have: Array, want: Array) -> npt.NDArray[np.intp]:
    """Indices of the elements that have not the same bits: NaN may be equal, and 0 and -0 are not."""
    whole = f"u{have.itemsize}"  # as one whole number each, thirty times as fast as byte by byte
    return np.flatnonzero(have.view(whole) != want.view(whole))


def _blocks(stored: FileTensor, wanted: Iterable[Array]) -> Iterator[tuple[int, Array, Array]]:
    """Index of the first element, what the file has and what is wanted, in pieces of a few megabytes."""
    start = 0
    with stored.open() as file:
        for block in wanted:
            flat = block.reshape(-1)
            for at in range(0, flat.size, _PIECE):
                piece = flat[at : at + _PIECE]
                yield start + at, _read(file, piece, stored), piece
            start += flat.size


def _read(file: BinaryIO, like: Array, stored: FileTensor) -> Array:
    data = file.read(like.nbytes)
    if len(data) != like.nbytes:
        raise BundleError(
            f"{stored.path} ends within {stored.name}",
            hint="get the bundle again, or export it again",
        )
    return np.frombuffer(data, like.dtype)
