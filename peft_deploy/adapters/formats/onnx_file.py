"""``.onnx_adapter`` files under their own names, read and written by onnxruntime."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peft_deploy.config.json_file import make_folder
from peft_deploy.environment import require_onnxruntime
from peft_deploy.errors import AdapterError, OutputError, listed
from peft_deploy.signature import LORA_RANKS, PREFIX_OFFSET
from peft_deploy.weights.source import DTYPES, Array

SUFFIX = ".onnx_adapter"
ADAPTER_VERSION = 1
UNKNOWN_BASE = (0, 1)  # model_version: not said; what onnxruntime's examples and Olive write
MAX_BYTES = 2**31 - 1  # offsets in the file are signed 32-bit numbers
MAGIC, MAGIC_AT = b"TORT", 4  # the file identifier of onnxruntime's adapter schema
# TensorProto.DataType; int64 are a prefix's offset and the ranks in a joint A.
_ONNX_TYPES = {"float32": 1, "int64": 7, "float16": 10, "float64": 11, "bfloat16": 16}
_DTYPE_OF = {number: dtype for dtype, number in _ONNX_TYPES.items()}


@dataclass(frozen=True)
class OnnxAdapterFile:
    """The contents of a file.

    Args:
        path: the file.
        model_version: which base model it is for, see :func:`model_version`; 0 when that is not said.
        adapter_version: of whatever wrote it.
        tensors: by the file's own names.
    """

    path: Path
    model_version: int
    adapter_version: int
    tensors: Mapping[str, Array]


def model_version(base_fingerprint: str) -> int:
    """31 bits of a base model's fingerprint, never 0, for the number that such a file carries."""
    return (int(base_fingerprint[:8], 16) & 0x7FFFFFFF) or 1


def write_onnx_adapter(path: Path, tensors: Mapping[str, Array], version: int) -> Path:
    """Writes a file; it appears whole or not at all.

    Args:
        path: the file.
        tensors: from :func:`onnx_tensors`.
        version: from :func:`model_version`; 0 for an unknown base model.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        AdapterError: more than the format can hold.
        OutputError: it cannot be written.
    """
    require_onnxruntime("writing an .onnx_adapter file")
    import onnxruntime

    size = sum(array.nbytes for array in tensors.values())
    if size > MAX_BYTES:
        raise AdapterError(
            f"the adapter has {size:,} bytes; an {SUFFIX} file holds at most {MAX_BYTES:,}"
        )
    file = onnxruntime.AdapterFormat()
    file.set_adapter_version(ADAPTER_VERSION)
    file.set_model_version(version)
    # onnxruntime looks at the arrays' own memory when it writes: both have to live until then
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    values = {name: _value(array) for name, array in arrays.items()}
    file.set_parameters(values)
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()  # onnxruntime's own error does not say why it cannot write
        file.export_adapter(str(temporary))
        if temporary.stat().st_size < size:
            raise OutputError(f"{path} cannot be written: is the disk full?")
        temporary.replace(path)
    except OSError as exc:
        raise OutputError(f"{path} cannot be written: {exc.strerror or exc}") from exc
    except RuntimeError as exc:
        raise OutputError(f"{path} cannot be written: {exc}") from exc
    finally:
        temporary.unlink(missing_ok=True)
    return path


def is_onnx_adapter(path: Path) -> bool:
    """Whether a file begins as these files do."""
    try:
        with path.open("rb") as file:
            return file.read(MAGIC_AT + len(MAGIC))[MAGIC_AT:] == MAGIC
    except OSError:
        return False


def read_onnx_file(path: Path) -> OnnxAdapterFile:
    """The contents of a file, under its own names.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        AdapterError: no such file, another kind of file, a damaged one, tensors that are not floating-point
            numbers but for a prefix's offset and the ranks in a joint A, NaN or infinity.
    """
    require_onnxruntime("reading an .onnx_adapter file")
    import onnxruntime

    if not is_onnx_adapter(path):
        raise _no_file(path)
    try:
        file = onnxruntime.AdapterFormat.read_adapter(str(path))
        values = file.get_parameters()
    except RuntimeError as exc:
        # onnxruntime's text begins with its own source's place and signature
        raise AdapterError(
            f"{path} is damaged: onnxruntime cannot verify it as an adapter",
            hint="copy it again, or write it again",
        ) from exc
    strange = [
        f"{name}: {value.data_type()}"
        for name, value in values.items()
        if value.element_type() not in _DTYPE_OF
        or (value.element_type() == _ONNX_TYPES["int64"]) != _is_integer(name)
    ]
    if strange:
        raise AdapterError(f"{path} holds tensors that cannot be read as LoRA:\n{listed(strange)}")
    tensors = {name: _array(value) for name, value in sorted(values.items())}
    broken = [name for name, array in tensors.items() if not np.isfinite(array).all()]
    if broken:
        raise AdapterError(f"{path} holds NaN or infinity in:\n{listed(broken)}")
    return OnnxAdapterFile(path, file.get_model_version(), file.get_adapter_version(), tensors)


def _is_integer(name: str) -> bool:
    return name == PREFIX_OFFSET or name.endswith(LORA_RANKS)


def _no_file(path: Path) -> AdapterError:
    if path.is_dir():
        return AdapterError(
            f"{path} is a folder, and an {SUFFIX} file is needed here",
            hint="for an adapter's folder: peft-deploy adapter convert … --to onnx --for BUNDLE",
        )
    return AdapterError(
        f"{path} {f'is not an {SUFFIX} file' if path.is_file() else 'does not exist'}"
    )


def _value(array: Array) -> Any:
    import onnxruntime

    if array.dtype == DTYPES["bfloat16"]:  # not one of numpy's own types
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
            array.view(np.uint16), _ONNX_TYPES["bfloat16"]
        )
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _array(value: Any) -> Array:
    """A copy of the value, since its memory is the file's."""
    dtype = DTYPES[_DTYPE_OF[value.element_type()]]
    shape = tuple(value.shape())
    if dtype != DTYPES["bfloat16"]:
        return np.array(value.numpy(), dtype=dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    # onnxruntime gives no numpy array of bfloat16; its memory holds the plain bit patterns
    return np.frombuffer(ctypes.string_at(value.data_ptr(), size), dtype).reshape(shape)
