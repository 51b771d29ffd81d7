"""The file beside the graph that holds all weights, written one tensor at a time.

It needs nothing but the tensors, so it is written while the converter's process still makes the graph.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from peft_deploy.atomic_folder import disk_errors
from peft_deploy.progress import Progress
from peft_deploy.weights import (
    Array,
    EncodedTensors,
    StoredTensor,
    TensorSource,
    contiguous_blocks,
)

# Runtimes map the file into memory: pages for what is worth mapping, a cache line for the rest.
PAGE, CACHE_LINE = 4096, 64


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

    Attributes:
        placements: name → where it lies.
        stored: tensor that is in the file as several others → what they are; none of the placements has its name.
        end: bytes written so far.
    """

    def __init__(self, path: Path, output: Path | None = None) -> None:
        self.path = path
        self.output = output or path.parent
        self.placements: dict[str, Placement] = {}
        self.stored: dict[str, StoredTensor] = {}
        with disk_errors(self.output):
            self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self.end = 0

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with disk_errors(self.output):
            self._file.close()

    @property
    def sha256(self) -> str:
        """Of what has been written so far, in hexadecimal."""
        return self._digest.hexdigest()

    def ordered(self, names: Iterable[str]) -> list[str]:
        """The order to add tensors in: layer 2 before layer 10, whatever the checkpoint's order is."""
        return sorted(names, key=_by_layer)

    def add(self, name: str, tensor: Array) -> None:
        """Appends a tensor; its memory is free again afterwards.

        Raises:
            OutputError: the disk is full, or another reason of the operating system's.
        """
        alignment = PAGE if tensor.nbytes >= PAGE else CACHE_LINE
        self._write(bytes(-self.end % alignment))
        start = self.end
        for block in contiguous_blocks(tensor):
            self._write(block.reshape(-1).view("uint8").data)
        length = self.end - start
        self.placements[name] = Placement(tensor.dtype.name, tensor.shape, start, length)

    def _write(self, data: bytes | memoryview) -> None:
        with disk_errors(self.output):
            self._file.write(data)
        self._digest.update(data)
        self.end += len(data)


def stream_weights(tensors: TensorSource, file: WeightFile, progress: Progress) -> None:
    """Writes all tensors of a source, reading one at a time.

    In the file's own order, so that it does not depend on the checkpoint's form.

    Args:
        tensors: in PaddleNLP's names and layout, encoded as the file is to hold them.
        file: to write to.
        progress: gets a phase counted in bytes.
    """
    names = file.ordered(tensors.names())
    sizes = {name: tensors.info(name).nbytes for name in names}
    progress.phase("Merging and writing weights", sum(sizes.values()), "bytes")
    for number, (name, size) in enumerate(sizes.items(), 1):
        file.add(name, tensors.read(name))
        progress.advance(size, f"{number} of {len(sizes)} tensors · {name}")
    if isinstance(tensors, EncodedTensors):
        file.stored |= tensors.stored


def _by_layer(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def add_tables(constants: Mapping[str, Array], file: WeightFile) -> None:
    """Appends the tables that a stand-in computed."""
    for name, table in constants.items():
        file.add(name, table)
