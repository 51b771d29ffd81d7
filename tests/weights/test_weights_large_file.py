"""Files written past the page cache hold what other files hold."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from peft_deploy.weights import large_file
from peft_deploy.weights.large_file import DirectFile, open_output

pytestmark = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="the system has no O_DIRECT")
MEMORY = 100_000


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with little memory, and pieces that fill the buffer several times."""
    monkeypatch.setattr(large_file, "available_memory", lambda: MEMORY)
    monkeypatch.setattr(large_file, "_BUFFER", 8192)
    try:
        DirectFile(tmp_path / "probe").close()
    except OSError:
        pytest.skip("this file system cannot be written past the page cache")


@pytest.mark.parametrize(
    "sizes", [[], [0], [1], [4096], [8192, 8192], [5, 8191, 20_000, 0, 4096, 3]]
)
def test_bytes_come_back(sizes: list[int], tmp_path: Path) -> None:
    parts = [np.random.default_rng(n).bytes(n) for n in sizes]
    path = tmp_path / "file"
    path.write_bytes(b"longer than what comes, and to be replaced" * 1000)
    with open_output(path, MEMORY) as file:
        assert isinstance(file, DirectFile)
        for part in parts:
            assert file.write(memoryview(part)) == len(part)
    assert file.closed
    assert path.read_bytes() == b"".join(parts)


def test_small_files_are_written_as_ever(tmp_path: Path) -> None:
    with open_output(tmp_path / "file", MEMORY // 2) as file:
        assert not isinstance(file, DirectFile)


def test_a_file_system_that_cannot_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "pwrite", refused)
    with open_output(tmp_path / "file", MEMORY) as file:
        file.write(b"as ever")
    assert (tmp_path / "file").read_bytes() == b"as ever"


def test_a_full_disk_is_an_error_that_leaves_no_file_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = open_output(tmp_path / "file", MEMORY)
    file.write(b"some")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        file.close()
    assert file.closed
    file.close()  # again: nothing happens


def test_nothing_follows_a_write_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file would have a hole that nobody knows of."""
    write, full = os.write, OSError(errno.ENOSPC, "No space left on device")

    def once(file: int, data: bytes) -> int:
        monkeypatch.setattr(os, "write", write)
        raise full

    file = open_output(tmp_path / "file", MEMORY)
    monkeypatch.setattr(os, "write", once)
    with pytest.raises(OSError, match="No space left"):
        file.write(bytes(20_000))
    with pytest.raises(OSError, match="earlier write failed"):
        file.write(b"more")
    file.close()
    assert file.closed


def test_what_cannot_be_opened_is_the_systems_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_output(tmp_path / "none" / "file", MEMORY)


def test_memory_for_direct_reads_is_not_given_to_forked_processes() -> None:
    """While a disk reads into it, copying on write would lose what it reads: open(2)."""
    memory = large_file.page_aligned(1 << 22)
    address = memory.__array_interface__["data"][0]
    flags, within = "", False
    for line in Path("/proc/self/smaps").read_text("ascii", errors="replace").splitlines():
        first = line.split(" ", 1)[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(end, 16) for end in first.split("-"))
            within = low <= address < high
        elif within and line.startswith("VmFlags:"):
            flags = line
    assert " dc" in flags
