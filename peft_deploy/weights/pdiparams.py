"""Paddle's combined parameter file, ``.pdiparams``: one record a tensor, one behind the other, without names.

A record, little-endian throughout (``SerializeToStream`` of Paddle's dense tensors, version 0)::

    uint32  version of the record, 0
    uint64  levels of detail, 0
    uint32  version of the tensor, 0
    int32   length of what follows next
    bytes   protobuf message TensorDesc: field 1 the element type, field 2 once for every dimension
    bytes   the numbers, row-major

Whoever reads the file gives the records their names: those of a program's parameters, sorted.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from peft_deploy.errors import CheckpointError
from peft_deploy.weights.source import DTYPES, TensorInfo

# VarType.Type of Paddle's framework.proto
_CODES = {
    "bool": 0,
    "int16": 1,
    "int32": 2,
    "int64": 3,
    "float16": 4,
    "float32": 5,
    "float64": 6,
    "uint8": 20,
    "int8": 21,
    "bfloat16": 22,
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_HEAD = struct.Struct("<IQIi")
_TYPE_TAG, _DIM_TAG, _PACKED_DIMS_TAG = (
    0x08,
    0x10,
    0x12,
)  # field number, and how its value is written
_MAX_DESC = 1 << 10  # bytes; a tensor of rank 9 has 101 at most


def record_head(dtype: str, shape: tuple[int, ...]) -> bytes:
    """What stands before a tensor's numbers.

    Args:
        dtype: numpy's name of the element type.
        shape: the dimensions.
    """
    desc = bytes((_TYPE_TAG,)) + _varint(_CODES[dtype])
    desc += b"".join(bytes((_DIM_TAG,)) + _varint(dim) for dim in shape)
    return _HEAD.pack(0, 0, 0, len(desc)) + desc


def read_records(path: Path) -> Iterator[TensorInfo]:
    """Type and shape of every tensor in a file, in its order; their names are empty. No numbers are read.

    Raises:
        CheckpointError: the file cannot be read, is cut off, or is something else.
    """
    return (info for info, _ in read_places(path))


def read_places(path: Path) -> Iterator[tuple[TensorInfo, int]]:
    """The same, each with the byte at which its numbers begin.

    Raises:
        CheckpointError: see :func:`read_records`.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            while file.tell() < size:
                start = file.tell()
                info, place = _read_head(path, file), file.tell()
                if place + info.nbytes > size:
                    raise CheckpointError(
                        f"{path} is cut off: the tensor at byte {start} ({info.dtype} "
                        f"{list(info.shape)}) ends after its {size} bytes"
                    )
                file.seek(info.nbytes, 1)
                yield info, place
    except OSError as exc:
        raise CheckpointError(f"{path} cannot be read: {exc}") from exc


def _read_head(path: Path, file: BinaryIO) -> TensorInfo:
    start = file.tell()
    try:
        version, levels, tensor_version, length = _HEAD.unpack(file.read(_HEAD.size))
        if version or levels or tensor_version or not 0 < length <= _MAX_DESC:
            raise ValueError("an unknown kind of record")
        dtype, shape = _read_desc(file.read(length), length)
        return TensorInfo("", dtype, shape)
    except (ValueError, KeyError, IndexError, struct.error) as exc:
        raise CheckpointError(
            f"{path} is not a .pdiparams file, or is damaged at byte {start}: {exc}"
        ) from None


def _read_desc(desc: bytes, length: int) -> tuple[str, tuple[int, ...]]:
    if len(desc) != length:
        raise ValueError("it ends within a record's head")
    dtype, dims, at = "", [], 0
    while at < length:
        tag, (value, at) = desc[at], _read_varint(desc, at + 1)
        if tag == _TYPE_TAG:
            dtype = _DTYPES[value]
        elif tag == _DIM_TAG:
            dims.append(value)
        elif tag == _PACKED_DIMS_TAG:
            end = at + value
            while at < end:
                dim, at = _read_varint(desc, at)
                dims.append(dim)
        else:
            raise ValueError(f"unknown field {tag >> 3} in a record's head")
    DTYPES[dtype]
    if any(dim >= 1 << 63 for dim in dims) or math.prod(dims) >= 1 << 63:
        raise ValueError(f"impossible dimensions {dims}")
    return dtype, tuple(dims)


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7
