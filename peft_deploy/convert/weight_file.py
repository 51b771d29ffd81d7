"""The file beside the graph that holds all weights, written one tensor at a time.

It needs nothing but the tensors, so it is written while the converter's process still makes the graph.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from peft_deploy.atomic_folder import disk_errors
from peft_deploy.errors import CheckpointError
from peft_deploy.progress import Progress
from peft_deploy.weights import (
    DTYPES,
    Array,
    EncodedTensors,
    StoredTensor,
    TensorInfo,
    TensorSource,
    contiguous_blocks,
)
from peft_deploy.weights.large_file import open_output
from peft_deploy.weights.pieces import in_order, pieces_of

# Runtimes map the file into memory: pages for what is worth mapping, a cache line for the rest.
PAGE, CACHE_LINE = 4096, 64
_BEHIND = 4  # pieces that were taken and are not yet hashed, or written


@dataclass(frozen=True)
class Placement:
    """Where a tensor lies.

    Args:
        dtype: numpy's name of the element type.
        shape: its dimensions.
        offset: of its first byte.
        length: in bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


class WeightFile:
    """Writes tensors one behind the other and remembers where; a context manager.

    Args:
        path: the file, made anew.
        output: the folder that the user named, for messages.
        nbytes: that it will have, about.

    Attributes:
        placements: name → where it lies.
        stored: tensor that is in the file as several others → what they are; none of the placements has its name.
        end: bytes written so far.
    """

    def __init__(self, path: Path, output: Path | None = None, nbytes: int = 0) -> None:
        self.path = path
        self.output = output or path.parent
        self.placements: dict[str, Placement] = {}
        self.stored: dict[str, StoredTensor] = {}
        with disk_errors(self.output):
            self._file = open_output(path, nbytes)
        self._sha = hashlib.sha256()
        self._hashing, self._writing = (
            _Behind("sha256", self._sha.update),
            _Behind("write", self._file.write),
        )
        self.end = 0

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._hashing.wait()
                with disk_errors(self.output):
                    self._writing.wait()
        finally:
            self._hashing.close()
            self._writing.close()
            with disk_errors(self.output):
                self._file.close()

    @property
    def sha256(self) -> str:
        """Of what has been written so far, in hexadecimal."""
        self._hashing.wait()
        return self._sha.hexdigest()

    def ordered(self, names: Iterable[str]) -> list[str]:
        """The order to add tensors in: layer 2 before layer 10, whatever the checkpoint's order is."""
        return sorted(names, key=_by_layer)

    def add(self, name: str, tensor: Array) -> None:
        """Appends a tensor; it is in the file and hashed afterwards, and may be changed.

        Raises:
            OutputError: the disk is full, or another reason of the operating system's.
        """
        info = TensorInfo(name, tensor.dtype.name, tensor.shape)
        self.begin(info)
        for block in contiguous_blocks(tensor):
            self.append(block)
        self._hashing.wait()
        with disk_errors(self.output):
            self._writing.wait()

    def begin(self, info: TensorInfo) -> None:
        """Makes a place for a tensor whose rows are then given to :meth:`append`, one piece after the other.

        Raises:
            OutputError: see :meth:`add`.
        """
        alignment = PAGE if info.nbytes >= PAGE else CACHE_LINE
        self._write(bytes(-self.end % alignment))
        self.placements[info.name] = Placement(info.dtype, info.shape, self.end, info.nbytes)

    def append(self, block: Array) -> None:
        """Writes the next rows of the tensor that was begun last.

        Args:
            block: in row-major order; not to be changed afterwards.

        Raises:
            OutputError: see :meth:`add`.
        """
        self._write(block.reshape(-1).view("uint8").data)

    def _write(self, data: bytes | memoryview) -> None:
        self._hashing.put(data)
        with disk_errors(self.output):
            self._writing.put(data)
        self.end += len(data)


def stream_weights(tensors: TensorSource, file: WeightFile, progress: Progress) -> None:
    """Writes all tensors of a source, reading one at a time.

    In the file's own order, so that it does not depend on the checkpoint's form.

    Args:
        tensors: in PaddleNLP's names and layout, encoded as the file is to hold them.
        file: to write to.
        progress: gets a phase counted in bytes.
    """
    infos = [tensors.info(name) for name in file.ordered(tensors.names())]
    total = sum(info.nbytes for info in infos)
    progress.phase("Writing weights", total, "bytes")
    pieces = in_order(piece for info in infos for piece in pieces_of(tensors, info.name))
    with closing(pieces):  # on an error, too: nobody may still compute when the files are closed
        for number, info in enumerate(infos, 1):
            _write_tensor(info, pieces, file)
            progress.advance(info.nbytes, f"{number} of {len(infos)} tensors · {info.name}")
    if isinstance(tensors, EncodedTensors):
        file.stored |= tensors.stored


def _write_tensor(info: TensorInfo, pieces: Iterator[Array], file: WeightFile) -> None:
    """Takes as many pieces as make up a tensor.

    Raises:
        CheckpointError: they are of another type, or do not end where the tensor does.
    """
    file.begin(info)
    left = info.nbytes
    while left > 0:
        block = next(pieces, None)
        if block is None or block.dtype != DTYPES[info.dtype] or block.nbytes > left:
            found = "nothing" if block is None else f"{block.dtype.name} {list(block.shape)}"
            raise CheckpointError(
                f"{info.name} was announced as {info.dtype} {list(info.shape)}; with {left} bytes of it to come, "
                f"{found} was read"
            )
        left -= block.nbytes
        file.append(block)


class _Behind:
    """Hands data on to a function in a thread of its own, in order and a few pieces behind.

    Args:
        name: of the thread.
        take: what is done to a piece of data.
    """

    def __init__(self, name: str, take: Callable[[bytes | memoryview], object]) -> None:
        self._take: Callable[[bytes | memoryview], object] | None = take
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"peft-deploy-{name}")
        self._waiting: deque[Future[object]] = deque()

    def put(self, data: bytes | memoryview) -> None:
        """Takes the next bytes, which must not change any more; raises what an earlier piece met."""
        self._waiting.append(self._pool.submit(self._hand_on, data))
        if len(self._waiting) > _BEHIND:
            self._waiting.popleft().result()

    def _hand_on(self, data: bytes | memoryview) -> None:
        take, self._take = self._take, None
        if take is not None:  # else an earlier piece failed: nothing may follow it
            take(data)
            self._take = take

    def wait(self) -> None:
        """Until everything is done; raises what a piece met."""
        while self._waiting:
            self._waiting.popleft().result()

    def close(self) -> None:
        """Ends the thread; what is waiting is not done any more."""
        self._pool.shutdown(cancel_futures=True)


def _by_layer(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def add_tables(constants: Mapping[str, Array], file: WeightFile) -> None:
    """Appends the tables that a stand-in computed."""
    for name, table in constants.items():
        file.add(name, table)
