"""Reads one safetensors file; the header is checked against the file before a tensor is read."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_deploy.errors import CheckpointError
from peft_deploy.weights._mapped import map_array
from peft_deploy.weights.source import DTYPES, Array, TensorInfo

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
LENGTH_BYTES = 8

DTYPE_OF_CODE = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
# PaddleNLP hands bfloat16 to the safetensors library as numpy's uint16, so its files say U16;
# Paddle has no tensor of that type. A file that torch wrote ("format": "pt") would mean what it
# says.
PADDLE_BFLOAT16_CODE = "U16"


class SafetensorsFile:
    """One safetensors file as a :class:`~peft_deploy.weights.source.TensorSource`.

    Args:
        path: the file.

    Attributes:
        path: the file.
        metadata: the ``__metadata__`` of its header.

    Raises:
        CheckpointError: not a safetensors file, cut short, or its header contradicts itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        header, self._data_start, self._data_bytes = _read_header(path)
        self.metadata = _metadata(path, header.pop("__metadata__", {}))
        self._offsets: dict[str, int] = {}
        self._infos: dict[str, TensorInfo] = {}
        spans: list[tuple[int, int, str]] = []
        for name, entry in header.items():
            info, begin, end = self._parse(name, entry)
            self._infos[name] = info
            self._offsets[name] = self._data_start + begin
            spans.append((begin, end, name))
        self._check_spans(sorted(spans))
        self._names = [name for _, _, name in sorted(spans)]

    def names(self) -> Sequence[str]:
        """All names, in the order of their data."""
        return self._names

    def info(self, name: str) -> TensorInfo:
        """Type and shape of one tensor."""
        return self._infos[name]

    def read(self, name: str) -> Array:
        """A read-only, memory-mapped view of one tensor."""
        info = self._infos[name]
        return map_array(self.path, self._offsets[name], info.dtype, info.shape)

    def _parse(self, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
        try:
            code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            numbers = [*shape, begin, end]
        except (KeyError, TypeError, ValueError) as exc:
            raise CheckpointError(
                f"{self.path}: the header's entry for {name} is damaged"
            ) from exc
        if any(type(n) is not int or n < 0 for n in numbers):
            raise CheckpointError(
                f"{self.path}: {name} has shape {shape} and offsets {[begin, end]}; "
                "all of them have to be whole numbers from 0"
            )
        info = TensorInfo(name, self._dtype(name, code), tuple(shape))
        if end - begin != info.nbytes:
            raise CheckpointError(
                f"{self.path}: {name} has {end - begin} bytes of data, "
                f"but {info.dtype} {list(shape)} takes {info.nbytes}"
            )
        return info, begin, end

    def _dtype(self, name: str, code: object) -> str:
        if code == PADDLE_BFLOAT16_CODE and self.metadata.get("format") != "pt":
            return "bfloat16"
        if isinstance(code, str) and code in DTYPE_OF_CODE:
            return DTYPE_OF_CODE[code]
        raise CheckpointError(
            f"{self.path}: {name} has the type {code}, which is not one of {', '.join(DTYPES)}",
            hint="a quantized checkpoint has to be dequantized first",
        )

    def _check_spans(self, spans: list[tuple[int, int, str]]) -> None:
        position = 0
        for begin, end, name in spans:
            if begin != position:
                raise CheckpointError(
                    f"{self.path}: the data of {name} begins at byte {begin} of the data section, "
                    f"but the tensor before it ends at {position}"
                )
            position = end
        if position != self._data_bytes:
            expected = self._data_start + position
            actual = self._data_start + self._data_bytes
            raise CheckpointError(
                f"{self.path} is {'cut short' if actual < expected else 'too long'}: "
                f"its header describes {expected} bytes, the file has {actual}",
                hint="download or copy the file again",
            )


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header, where the data section begins, and how long it is."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            start = file.read(LENGTH_BYTES)
            if len(start) < LENGTH_BYTES:
                raise CheckpointError(
                    f"{path} is cut short: it has {size} bytes, "
                    f"fewer than the {LENGTH_BYTES} that begin a safetensors file"
                )
            (length,) = struct.unpack("<Q", start)
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path} is not a safetensors file: its header would have {length} bytes, "
                    f"at most {MAX_HEADER_BYTES} are allowed"
                )
            data_start = LENGTH_BYTES + length
            if data_start > size:
                raise CheckpointError(
                    f"{path} is cut short: its header alone ends at byte {data_start}, "
                    f"the file has {size}",
                    hint="download or copy the file again",
                )
            raw = file.read(length)
    except OSError as exc:
        raise CheckpointError(f"{path} cannot be read: {exc.strerror or exc}") from exc
    return _decode_header(path, raw), data_start, size - data_start


def _decode_header(path: Path, raw: bytes) -> dict[str, Any]:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{path}: the header lists {twice} twice")
        return result

    try:
        header = json.loads(raw, object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{path}: the header is not JSON: {exc}") from exc
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object")
    return header


def _metadata(path: Path, value: Any) -> Mapping[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise CheckpointError(f"{path}: __metadata__ has to be an object of strings")
    return value
