"""The values that a tensor file's pickle may describe, and what its globals do, on plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Global(Enum):
    """What a file may name: the parts of which numpy arrays and plain containers are built."""

    NDARRAY = "numpy.ndarray"
    RECONSTRUCT = "numpy array constructor"
    SCALAR = "numpy scalar constructor"
    DTYPE = "numpy.dtype"
    ENCODE = "codecs.encode"
    BYTES = "bytes"
    TUPLE = "tuple"
    ORDERED_DICT = "collections.OrderedDict"


ADMITTED: dict[tuple[str, str], Global] = {
    ("numpy", "ndarray"): Global.NDARRAY,
    ("numpy", "dtype"): Global.DTYPE,
    # numpy 1 and numpy 2 call the module differently
    ("numpy.core.multiarray", "_reconstruct"): Global.RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): Global.RECONSTRUCT,
    ("numpy.core.multiarray", "scalar"): Global.SCALAR,
    ("numpy._core.multiarray", "scalar"): Global.SCALAR,
    ("_codecs", "encode"): Global.ENCODE,
    # protocol 2 writes Python 2's name of the module
    ("builtins", "bytes"): Global.BYTES,
    ("__builtin__", "bytes"): Global.BYTES,
    ("builtins", "tuple"): Global.TUPLE,
    ("__builtin__", "tuple"): Global.TUPLE,
    ("collections", "OrderedDict"): Global.ORDERED_DICT,
}


@dataclass(frozen=True)
class Span:
    """Bytes that were left in the file.

    Args:
        offset: position in the file.
        length: number of bytes there.
        text: they are UTF-8 of characters up to U+00FF, each of which stands for one byte.
    """

    offset: int
    length: int
    text: bool = False


@dataclass
class PickledDtype:
    """A numpy dtype under construction.

    Args:
        code: kind and size, as in ``"f4"``.
        byte_order: ``"<"``, ``">"`` or ``"|"``.
    """

    code: str
    byte_order: str = "|"


@dataclass
class PickledArray:
    """A numpy array whose data is still in the file."""

    shape: tuple[int, ...] = ()
    dtype: PickledDtype = field(default_factory=lambda: PickledDtype(""))
    fortran: bool = False
    data: Span | bytes = b""


def construct(function: Global, arguments: tuple[Any, ...]) -> Any:
    """What calling an admitted global with these arguments would give.

    Raises:
        ValueError: numpy and paddle.save never write such a call.
    """
    if function is Global.RECONSTRUCT and arguments[0] is Global.NDARRAY:
        return PickledArray()
    if function is Global.DTYPE and type(arguments[0]) is str:
        return PickledDtype(arguments[0])
    if function is Global.SCALAR and isinstance(arguments[0], PickledDtype):
        return PickledArray((), arguments[0], False, _payload(arguments[1]))
    if function is Global.ENCODE and arguments[1] == "latin1":
        return _encoded(arguments[0])
    if function is Global.BYTES and arguments == ():
        return b""
    if function is Global.TUPLE and type(arguments[0]) in (tuple, list):
        return tuple(arguments[0])
    if function is Global.ORDERED_DICT and arguments == ():
        return {}
    raise ValueError(f"it calls {function.value} in a way that numpy does not")


def set_state(target: object, state: object) -> None:
    """Completes an array or a dtype, as ``__setstate__`` would.

    Raises:
        ValueError: the target takes no state, or the state is not what numpy writes.
    """
    if type(state) is tuple and isinstance(target, PickledDtype):
        _set_dtype_state(target, state)
    elif type(state) is tuple and isinstance(target, PickledArray):
        _set_array_state(target, state)
    else:
        raise ValueError("it holds an object with a state of its own")


def _encoded(text: object) -> Span | bytes:
    if isinstance(text, str):
        return text.encode("latin1")
    if isinstance(text, Span) and text.text:
        return text
    raise ValueError("the data of an array is neither text nor bytes")


def _payload(value: object) -> Span | bytes:
    if isinstance(value, (Span, bytes)):
        return value
    raise ValueError("the data of an array is not bytes; arrays of Python objects are not read")


def _set_array_state(array: PickledArray, state: tuple[Any, ...]) -> None:
    _, shape, dtype, fortran, data = state
    if type(shape) is not tuple or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError("the shape of an array is not a tuple of whole numbers")
    if not isinstance(dtype, PickledDtype):
        raise ValueError("the type of an array is not a numpy dtype")
    array.shape, array.dtype, array.fortran = shape, dtype, bool(fortran)
    array.data = _payload(data)


def _set_dtype_state(dtype: PickledDtype, state: tuple[Any, ...]) -> None:
    _, order, subarray, names, fields = state[:5]
    if not (subarray is None and names is None and fields is None) or order not in ("<", ">", "|"):
        raise ValueError("an array has a type with fields")
    dtype.byte_order = order
