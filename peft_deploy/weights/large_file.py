"""Files that are too large to be kept in memory as well.

What is written to a file goes to the page cache first, and to the disk some time later. Where the cache cannot hold
it beside the checkpoint that it is made of, nothing is gained by that: its pages drive out the checkpoint's, and
making room for them took a quarter of all computing time of an export (13.5 GB, two cores). So large files go to the
disk at once.
"""

from __future__ import annotations

import contextlib
import errno
import io
import mmap
import os
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

import numpy as np

from peft_deploy.environment import available_memory
from peft_deploy.weights._mapped import FileSpan
from peft_deploy.weights.source import Array

if TYPE_CHECKING:
    from typing_extensions import Buffer

BLOCK = 4096  # addresses, positions and lengths are multiples of it: no disk has larger sectors
_BUFFER = 8 << 20
_DIRECT = getattr(os, "O_DIRECT", None)  # Linux has it


def is_large(nbytes: int) -> bool:
    """Whether so many bytes do not fit into memory twice: once as they are read, once as they are written."""
    free = available_memory()
    return free is not None and 2 * nbytes > free


def open_output(path: Path, nbytes: int) -> IO[bytes]:
    """Makes a file anew, to write from its beginning to its end.

    Args:
        path: the file.
        nbytes: that it will have, about.

    Raises:
        OSError: it cannot be written.
    """
    if _DIRECT is not None and is_large(nbytes):
        try:
            return cast(IO[bytes], DirectFile(path))
        except OSError:  # file systems need not be able to; whatever else is wrong comes up again
            pass
    return path.open("wb")


def read_past_cache(span: FileSpan, into: Array) -> int | None:
    """Reads a part of a file.

    Args:
        span: the part.
        into: bytes that begin at a page, :func:`room_for` of them.

    Returns:
        Where in ``into`` the part begins; None where the file system does not read so, or the file has become shorter.
    """
    if _DIRECT is None:
        return None
    begin = span.offset % BLOCK
    try:
        file = os.open(span.path, os.O_RDONLY | _DIRECT)
        try:
            done, room = 0, room_for(span)
            while done < begin + span.nbytes:
                read = os.preadv(file, [into[done:room].data], span.offset - begin + done)
                if read == 0 or (read % BLOCK and done + read < begin + span.nbytes):
                    return None
                done += read
        finally:
            os.close(file)
    except OSError:
        return None
    return begin


def room_for(span: FileSpan) -> int:
    """Bytes of the blocks that a part of a file lies in."""
    size = span.offset % BLOCK + span.nbytes
    return size + -size % BLOCK


def page_aligned(nbytes: int) -> Array:
    """Fresh memory that begins at a page.

    Raises:
        OSError: there is none.
    """
    memory = mmap.mmap(
        -1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )  # what is shared gets no huge pages
    # What a disk reads into while the process forks must not be shared with the child: open(2), "NOTES", O_DIRECT.
    for wish in ("MADV_DONTFORK", "MADV_HUGEPAGE"):
        if hasattr(mmap, wish):
            with contextlib.suppress(OSError):
                memory.madvise(getattr(mmap, wish))
    return np.frombuffer(memory, np.uint8)


class DirectFile(io.RawIOBase):
    """A file that is written past the page cache. After an error it can only be closed.

    Args:
        path: the file, made anew.

    Raises:
        OSError: it cannot be written, or not in this way.
    """

    _file = -1  # also where it could not be opened

    def __init__(self, path: Path) -> None:
        assert _DIRECT is not None
        self._buffer = page_aligned(_BUFFER)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _DIRECT, 0o666)
        self._filled = self._size = 0
        self._sound = True
        try:  # some file systems say only now that they cannot
            os.pwrite(self._file, self._buffer[:BLOCK].data, 0)
        except OSError:
            self._release()
            raise

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, data: Buffer, /) -> int:
        """Appends bytes, all of them."""
        if not self._sound:
            raise OSError(errno.EIO, "an earlier write failed")
        array = np.frombuffer(memoryview(data), np.uint8)
        taken = 0
        while taken < array.size:
            part = array[taken : taken + _BUFFER - self._filled]
            self._buffer[self._filled : self._filled + part.size] = part
            self._filled += part.size
            taken += part.size
            if self._filled == _BUFFER:
                self._empty()
        self._size += array.size
        return taken

    def close(self) -> None:
        """Writes what is left and gives the file its size."""
        if self._file < 0:
            return
        try:
            if self._sound:
                self._filled += -self._filled % BLOCK
                self._empty()
                os.ftruncate(self._file, self._size)
        finally:
            self._release()

    def _release(self) -> None:
        os.close(self._file)
        self._file = -1
        super().close()

    def _empty(self) -> None:
        self._sound, left = False, self._buffer[: self._filled].data
        while left.nbytes:
            left = left[os.write(self._file, left) :]
        self._sound, self._filled = True, 0
