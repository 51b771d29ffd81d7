"""Which files an ONNX model refers to, read without loading a weight.

A model's external data is a path that the file itself chooses. Somebody else's bundle must not be
able to name a file outside its own folder, so the references are read from the protobuf before a
runtime opens the model.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from peft_deploy.errors import BundleError

# Field numbers of onnx.proto: message → field → message that it holds. Whatever is not here is
# skipped unread.
_FIELDS: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {
        5: "Tensor",
        6: "Graph",
        10: "Tensor",
        11: "Graph",
        22: "SparseTensor",
        23: "SparseTensor",
    },
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # protobuf wire types


def external_locations(model: Path) -> set[str]:
    """The external data locations that a model names, as they stand in the file.

    Raises:
        BundleError: the file cannot be read, or is not an ONNX model.
    """
    try:
        with model.open("rb") as file:
            if model.stat().st_size == 0:
                raise BundleError(f"{model} is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return set(_locations(data, 0, len(data), "Model"))
    except OSError as exc:
        raise BundleError(f"{model} cannot be read: {exc}") from exc
    except (ValueError, RecursionError) as exc:
        raise BundleError(f"{model} is not an ONNX model, or is damaged: {exc}") from exc


def check_external_data(model: Path) -> set[Path]:
    """The external data files of a model, each of them an existing file inside the model's own
    folder.

    Raises:
        BundleError: a location is absolute, leaves the folder (by ``..`` or a link), or does not
            exist.
    """
    folder = model.parent.resolve()
    files = set()
    for location in sorted(external_locations(model)):
        path = (folder / location).resolve()
        absolute = PurePosixPath(location).is_absolute() or PureWindowsPath(location).drive
        if absolute or not location or not path.is_relative_to(folder):
            raise BundleError(
                f"{model} keeps weights in {location!r}, which is outside its folder",
                hint="take bundles only from people you trust; a sound one keeps its weights "
                "beside the model",
            )
        if not path.is_file():
            raise BundleError(f"{model} keeps weights in {location!r}, which is not there")
        files.add(path)
    return files


def _locations(data: mmap.mmap, start: int, end: int, message: str) -> Iterator[str]:
    held = _FIELDS[message]
    for field, begin, stop in _fields(data, start, end):
        inner = held.get(field)
        if inner == "Entry":
            entry = {number: data[a:b] for number, a, b in _fields(data, begin, stop)}
            if entry.get(_ENTRY_KEY) == b"location":
                yield entry.get(_ENTRY_VALUE, b"").decode("utf-8")
        elif inner is not None:
            yield from _locations(data, begin, stop, inner)


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, begin and end of each length-delimited field of a message."""
    at = start
    while at < end:
        tag, at = _varint(data, at, end)
        kind = tag & 7
        if kind == _BYTES:
            length, at = _varint(data, at, end)
            if at + length > end:
                raise ValueError(f"a field at byte {at} goes beyond its message")
            yield tag >> 3, at, at + length
            at += length
        elif kind == _VARINT:
            _, at = _varint(data, at, end)
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"unknown wire type {kind} at byte {at}")
    if at != end:
        raise ValueError(f"a message ends at byte {at} and should end at {end}")


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, at
        shift += 7
        if shift > 63:
            break
    raise ValueError(f"a number at byte {at} has no end")
