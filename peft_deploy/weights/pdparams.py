"""Reads one ``.pdparams`` file, a pickle, without running anything in it or holding it."""

from __future__ import annotations

import codecs
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from peft_deploy.errors import CheckpointError
from peft_deploy.weights._mapped import map_array
from peft_deploy.weights._pickle_machine import PickleMachine
from peft_deploy.weights._pickle_values import PickledArray, Span
from peft_deploy.weights.source import DTYPES, Array, TensorInfo

NAME_TABLE = "StructuredToParameterName@@"  # structured name → Paddle's own; not needed here
# Protocols 2 and 3 hold at most 4 GiB, so paddle.save cuts larger arrays (sic, the spelling is
# Paddle's).
SLICES_TABLE = "UnpackBigParamInfor@@"

DTYPE_OF_CODE = {
    "f8": "float64",
    "f4": "float32",
    "f2": "float16",
    # Paddle has no tensor of 16 unsigned bits: its numpy() gives uint16 for bfloat16, and
    # paddle.load makes bfloat16 of uint16.
    "u2": "bfloat16",
    "i8": "int64",
    "i4": "int32",
    "i2": "int16",
    "i1": "int8",
    "u1": "uint8",
    "b1": "bool",
}


_Parts = tuple[tuple[int, ...], tuple[PickledArray, ...]]  # the tensor's shape, its pieces


@dataclass(frozen=True)
class _Stored:
    """Where one tensor's data lies: in one array, or in several that have to be joined."""

    info: TensorInfo
    arrays: tuple[PickledArray, ...]


class PdparamsFile:
    """One file of ``paddle.save(state_dict)``, as a source of tensors.

    Args:
        path: the file.

    Attributes:
        path: the file.
        metadata: always empty, the format has none.

    Raises:
        CheckpointError: cut short, damaged, not a flat dictionary of tensors, or a pickle that
            holds anything but numpy arrays and plain containers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: Mapping[str, str] = {}
        try:
            with path.open("rb") as file:
                value = PickleMachine(file, path).run()
        except OSError as exc:
            raise CheckpointError(f"{path} cannot be read: {exc.strerror or exc}") from exc
        if not isinstance(value, dict):
            raise CheckpointError(f"{path} holds no dictionary of tensors, but a {_kind(value)}")
        value.pop(NAME_TABLE, None)
        slices = value.pop(SLICES_TABLE, {})
        self._stored: dict[str, _Stored] = {}
        for name, (shape, parts) in _joined(path, value, slices).items():
            self._stored[name] = self._describe(name, shape, parts)

    def names(self) -> Sequence[str]:
        """All names, in the order of the file."""
        return list(self._stored)

    def info(self, name: str) -> TensorInfo:
        """Type and shape of one tensor."""
        return self._stored[name].info

    def read(self, name: str) -> Array:
        """One tensor: mapped where the file holds its bytes as they are, otherwise a new array."""
        stored = self._stored[name]
        info = stored.info
        if len(stored.arrays) == 1:
            return self._read_array(name, stored.arrays[0], info)
        flat = np.empty(math.prod(info.shape), DTYPES[info.dtype])
        position = 0
        for part in stored.arrays:
            count = math.prod(part.shape)
            part_info = TensorInfo(name, info.dtype, part.shape)
            flat[position : position + count] = self._read_array(name, part, part_info)
            position += count
        return flat.reshape(info.shape)

    def _read_array(self, name: str, array: PickledArray, info: TensorInfo) -> Array:
        order: Literal["F", "C"] = "F" if array.fortran else "C"
        if isinstance(array.data, bytes):
            return np.frombuffer(array.data, DTYPES[info.dtype]).reshape(info.shape, order=order)
        if not array.data.text:
            return map_array(
                self.path, array.data.offset, info.dtype, info.shape, fortran=array.fortran
            )
        flat = np.empty(info.nbytes, np.uint8)
        try:
            with self.path.open("rb") as file:
                _decode_text(file, array.data, flat.data)
        except (OSError, ValueError) as exc:
            raise CheckpointError(f"{self.path}: {name} is damaged: {exc}") from exc
        return flat.view(DTYPES[info.dtype]).reshape(info.shape, order=order)

    def _describe(
        self, name: str, shape: tuple[int, ...], arrays: tuple[PickledArray, ...]
    ) -> _Stored:
        codes = {(a.dtype.code, a.dtype.byte_order) for a in arrays}
        code, byte_order = codes.pop()
        if codes or code not in DTYPE_OF_CODE or byte_order == ">":
            raise CheckpointError(
                f"{self.path}: {name} has the numpy type {byte_order}{code}; "
                f"little-endian {', '.join(sorted(DTYPE_OF_CODE))} can be read"
            )
        dtype = DTYPE_OF_CODE[code]
        if len(arrays) > 1 and sum(math.prod(a.shape) for a in arrays) != math.prod(shape):
            raise CheckpointError(f"{self.path}: the slices of {name} do not fill {list(shape)}")
        for array in arrays:
            expected = math.prod(array.shape) * DTYPES[dtype].itemsize
            if not _fits(array.data, expected):
                raise CheckpointError(
                    f"{self.path}: {name} {list(array.shape)} takes {expected} bytes, but has "
                    f"{array.data.length if isinstance(array.data, Span) else len(array.data)}"
                )
        return _Stored(TensorInfo(name, dtype, shape), arrays)


def _fits(data: Span | bytes, expected: int) -> bool:
    if isinstance(data, bytes):
        return len(data) == expected
    if data.text:  # UTF-8 takes one or two bytes for each; the exact number shows when it is read
        return expected <= data.length <= 2 * expected
    return data.length == expected


def _joined(path: Path, value: dict[str, Any], slices: Any) -> dict[str, _Parts]:
    """Each tensor's shape and the arrays that hold it: several where paddle.save cut it."""
    whole: dict[str, _Parts] = {}
    try:
        for name, table in slices.items():
            parts = tuple(value.pop(part) for part in table["slices"])
            shape = tuple(int(n) for n in table["OriginShape"])
            if not parts or any(
                not isinstance(p, PickledArray) or len(p.shape) != 1 for p in parts
            ):
                raise ValueError(f"the slices of {name} are not flat arrays")
            whole[name] = shape, parts
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise CheckpointError(f"{path}: the table of cut arrays is damaged: {exc}") from exc
    plain = {name: _array(path, name, item) for name, item in value.items()}
    return {name: (array.shape, (array,)) for name, array in plain.items()} | whole


def _array(path: Path, name: object, value: Any) -> PickledArray:
    # Paddle writes a tensor outside a plain state dict as the pair of its own name and its data.
    if type(value) is tuple and len(value) == 2 and type(value[0]) is str:
        value = value[1]
    if not isinstance(value, PickledArray) or type(name) is not str:
        raise CheckpointError(
            f"{path}: {name!r} is not a tensor but a {_kind(value)}; "
            "a checkpoint of weights is a flat dictionary of tensors",
            hint="save the model's state_dict by itself",
        )
    return value


def _kind(value: object) -> str:
    return "numpy array" if isinstance(value, PickledArray) else type(value).__name__


def _decode_text(file: BinaryIO, span: Span, target: memoryview, chunk: int = 1 << 18) -> None:
    """Writes the bytes that a text span stands for into ``target``, a little at a time."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    file.seek(span.offset)
    position, left = 0, span.length
    while left:
        raw = file.read(min(chunk, left))
        if not raw:
            raise ValueError("the file has become shorter")
        left -= len(raw)
        data = decoder.decode(raw, final=left == 0).encode("latin1")
        if position + len(data) > len(target):
            raise ValueError(
                f"an array has more than the {len(target)} bytes that its shape takes"
            )
        target[position : position + len(data)] = data
        position += len(data)
    if position != len(target):
        raise ValueError(f"an array has {position} bytes, its shape takes {len(target)}")
