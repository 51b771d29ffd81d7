"""Wall time and peak memory of a command and all processes that it starts.

Memory is the resident size of the whole process tree, sampled every 50 ms; pages that its processes share are counted
once for each of them.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLING_SECONDS = 0.05


@dataclass(frozen=True)
class Measured:
    """One run of a command.

    Args:
        seconds: wall time.
        tree_peak: greatest memory of all its processes at one time, in bytes.
        largest: greatest resident size that a single one of them reached, in bytes.
    """

    seconds: float
    tree_peak: int
    largest: int


def run_measured(
    command: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> Measured:
    """Runs a command to its end; what it prints is in the error when it fails.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    with tempfile.TemporaryFile() as output:  # a pipe that nobody reads would fill up
        start = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=cwd, env=env, stdout=output, stderr=subprocess.STDOUT
        )
        tree_peak, largest = 0, 0
        while process.poll() is None:
            tree = process_tree(process.pid)
            tree_peak = max(tree_peak, sum(resident(pid) for pid in tree))
            largest = max([largest, *(resident(pid, "VmHWM") for pid in tree)])
            time.sleep(SAMPLING_SECONDS)
        seconds = time.perf_counter() - start
        if process.returncode:
            output.seek(0)
            raise subprocess.CalledProcessError(process.returncode, command, output.read())
    return Measured(seconds, tree_peak, largest)


def process_tree(root: int) -> list[int]:
    """A process and all that it started, itself first."""
    tree = [root]
    for pid in tree:
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            tree += map(int, _text(children).split())
    return tree


def resident(pid: int | str, key: str = "VmRSS") -> int:
    """A process's resident memory in bytes, or with ``VmHWM`` the most that it ever was; 0 of one that is gone."""
    for line in _text(Path(f"/proc/{pid}/status")).splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0


def _text(path: Path) -> str:
    """A file's contents; nothing for that of a process which is gone."""
    try:
        return path.read_text()
    except OSError:
        return ""
