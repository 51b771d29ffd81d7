"""Interprets the pickle instructions that a tensor file needs, calling nothing that it names.

Python's own unpickler imports the globals that a file names and calls them. This one knows a
fixed list of globals by name, represents each by a value of an enumeration, and carries out what
each of them would do on plain data. Everything else is refused, so there is nothing in a file
that could run. Payloads are skipped and remembered as positions in the file, so that reading a 10
GB file costs a few kilobytes.
"""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from peft_deploy.errors import CheckpointError
from peft_deploy.weights._pickle_values import ADMITTED, Global, Span, construct, set_state

MAX_PROTOCOL = 4  # paddle.save writes 2 to 4
KEPT_TEXT_BYTES = 4096  # longer text can only be the data of an array in protocol 2 or 3


class PickleMachine:
    """Runs one file's instructions.

    Args:
        file: opened for reading in binary, positioned at the start.
        path: its name, for messages.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._size = os.fstat(file.fileno()).st_size
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The value that the file describes: plain containers and :class:`PickledArray`.

        Raises:
            CheckpointError: cut short, damaged, or it names a global that is not admitted.
        """
        try:
            while True:
                opcode = self._take(1)
                if opcode == pickle.STOP:
                    break
                action = _ACTIONS.get(opcode)
                if action is None:
                    raise self._refused(f"the pickle instruction {opcode!r}")
                action(self)
            result = self._stack.pop()
        except (IndexError, KeyError, TypeError, ValueError, AttributeError) as exc:
            raise self._damaged(str(exc)) from exc
        if self._stack or self._marks:
            raise self._damaged("it ends in the middle of a value")
        if self._file.tell() != self._size:
            raise self._damaged(f"{self._size - self._file.tell()} bytes follow its end")
        return result

    # The instructions, named as in Python's documentation of them.

    def proto(self) -> None:
        version = self._take(1)[0]
        if version > MAX_PROTOCOL:
            raise CheckpointError(
                f"{self._path} is a pickle of protocol {version}; "
                f"paddle.save writes 2 to {MAX_PROTOCOL}"
            )

    def frame(self) -> None:
        self._take(8)  # a hint for buffering

    def constant(self, value: object) -> None:
        self._stack.append(value)

    def number(self, layout: str) -> None:
        self._stack.append(self._unpack(layout))

    def long1(self) -> None:
        self._stack.append(int.from_bytes(self._take(self._unpack("<B")), "little", signed=True))

    def text(self, layout: str) -> None:
        length = self._unpack(layout)
        if length > KEPT_TEXT_BYTES:
            self._stack.append(self._skip(length, text=True))
        else:
            self._stack.append(self._take(length).decode("utf-8"))

    def payload(self, layout: str) -> None:
        self._stack.append(self._skip(self._unpack(layout)))

    def mark(self) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def empty_list(self) -> None:
        self._stack.append([])

    def empty_dict(self) -> None:
        self._stack.append({})

    def long_tuple(self) -> None:
        items = self._since_mark()
        self._stack.append(tuple(items))

    def short_tuple(self, length: int) -> None:
        items = [self._stack.pop() for _ in range(length)]
        self._stack.append(tuple(reversed(items)))

    def append(self) -> None:
        self._extend([self._stack.pop()])

    def appends(self) -> None:
        self._extend(self._since_mark())

    def setitem(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._update([key, value])

    def setitems(self) -> None:
        self._update(self._since_mark())

    def memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def put(self, layout: str) -> None:
        self._memo[self._unpack(layout)] = self._stack[-1]

    def get(self, layout: str) -> None:
        self._stack.append(self._memo[self._unpack(layout)])

    def global_(self) -> None:
        module, name = self._line(), self._line()
        self._stack.append(self._admit(module, name))

    def stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._stack.append(self._admit(module, name))

    def reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, Global) or type(arguments) is not tuple:
            raise self._damaged("it calls something that is not a function")
        self._stack.append(construct(function, arguments))

    def build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        set_state(target, state)

    def _admit(self, module: object, name: object) -> Global:
        if type(module) is str and type(name) is str:
            known = ADMITTED.get((module, name))
            if known is not None:
                return known
            raise self._refused(f"{module}.{name}"[:200])
        raise self._damaged("the name of a global is not text")

    # Access to the file and the stack.

    def _take(self, count: int) -> bytes:
        data = self._file.read(count) if count <= self._size else b""
        if len(data) != count:
            raise self._short(count)
        return data

    def _skip(self, length: int, *, text: bool = False) -> Span:
        offset = self._file.tell()
        if offset + length > self._size:
            raise self._short(length)
        self._file.seek(length, os.SEEK_CUR)
        return Span(offset, length, text)

    def _unpack(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _line(self) -> str:
        line = self._file.readline(KEPT_TEXT_BYTES)
        if not line.endswith(b"\n"):
            raise self._short(1)
        return line[:-1].decode("utf-8")

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise self._damaged("it appends to something that is not a list")
        target.extend(items)

    def _update(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict:
            raise self._damaged("it sets an item of something that is not a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):
                raise self._damaged("a dictionary has a key that is neither text nor a number")
            target[key] = value

    # Errors.

    def _refused(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self._path} is a pickle that holds {what}; "
            "only numpy arrays and plain containers are read, and nothing in the file was run",
            hint="convert the checkpoint to safetensors on a machine that trusts it",
        )

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self._path} is not a file that paddle.save wrote, or it is damaged: {why}"
        )

    def _short(self, wanted: int) -> CheckpointError:
        return CheckpointError(
            f"{self._path} is cut short: at byte {self._file.tell()} "
            f"another {wanted} bytes are needed, the file has {self._size}",
            hint="download or copy the file again",
        )


_Action = Callable[[PickleMachine], None]

_ACTIONS: dict[bytes, _Action] = {
    pickle.PROTO: PickleMachine.proto,
    pickle.FRAME: PickleMachine.frame,
    pickle.NONE: lambda m: m.constant(None),
    pickle.NEWTRUE: lambda m: m.constant(True),
    pickle.NEWFALSE: lambda m: m.constant(False),
    pickle.EMPTY_TUPLE: lambda m: m.constant(()),
    pickle.BININT: lambda m: m.number("<i"),
    pickle.BININT1: lambda m: m.number("<B"),
    pickle.BININT2: lambda m: m.number("<H"),
    pickle.BINFLOAT: lambda m: m.number(">d"),
    pickle.LONG1: PickleMachine.long1,
    pickle.SHORT_BINUNICODE: lambda m: m.text("<B"),
    pickle.BINUNICODE: lambda m: m.text("<I"),
    pickle.BINUNICODE8: lambda m: m.text("<Q"),
    pickle.SHORT_BINBYTES: lambda m: m.payload("<B"),
    pickle.BINBYTES: lambda m: m.payload("<I"),
    pickle.BINBYTES8: lambda m: m.payload("<Q"),
    pickle.MARK: PickleMachine.mark,
    pickle.EMPTY_LIST: PickleMachine.empty_list,
    pickle.EMPTY_DICT: PickleMachine.empty_dict,
    pickle.TUPLE: PickleMachine.long_tuple,
    pickle.TUPLE1: lambda m: m.short_tuple(1),
    pickle.TUPLE2: lambda m: m.short_tuple(2),
    pickle.TUPLE3: lambda m: m.short_tuple(3),
    pickle.APPEND: PickleMachine.append,
    pickle.APPENDS: PickleMachine.appends,
    pickle.SETITEM: PickleMachine.setitem,
    pickle.SETITEMS: PickleMachine.setitems,
    pickle.MEMOIZE: PickleMachine.memoize,
    pickle.BINPUT: lambda m: m.put("<B"),
    pickle.LONG_BINPUT: lambda m: m.put("<I"),
    pickle.BINGET: lambda m: m.get("<B"),
    pickle.LONG_BINGET: lambda m: m.get("<I"),
    pickle.GLOBAL: PickleMachine.global_,
    pickle.STACK_GLOBAL: PickleMachine.stack_global,
    pickle.REDUCE: PickleMachine.reduce,
    pickle.BUILD: PickleMachine.build,
}
