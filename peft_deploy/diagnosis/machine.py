"""The interpreter and the processor."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

MKL_SWITCH = "MKL_DEBUG_CPU_TYPE"
MKL_FAST = "5"
_CPUINFO = Path("/proc/cpuinfo")
_AMD = "AuthenticAMD"


@dataclass(frozen=True)
class Machine:
    """What this process runs on.

    Args:
        python: the interpreter's version.
        implementation: ``CPython``.
        system: operating system and architecture.
        processor: its name; empty when the system does not tell.
        amd: whether AMD made it.
        cores: that this process may use.
        memory: bytes in all; None when the system does not tell.
        mkl_switch: the value of MKL_DEBUG_CPU_TYPE in the environment, if any.
    """

    python: str
    implementation: str
    system: str
    processor: str
    amd: bool
    cores: int
    memory: int | None
    mkl_switch: str | None


def this_machine() -> Machine:
    """The machine as it is now."""
    try:
        cpuinfo = _CPUINFO.read_text("utf-8", errors="replace")
    except OSError:
        cpuinfo = ""
    names = [
        line.partition(":")[2].strip() for line in cpuinfo.splitlines() if "model name" in line
    ]
    return Machine(
        python=platform.python_version(),
        implementation=platform.python_implementation(),
        system=f"{platform.system()} {platform.machine()}",
        processor=names[0] if names else platform.processor(),
        amd=_AMD in cpuinfo,
        cores=_cores(),
        memory=_memory(),
        mkl_switch=os.environ.get(MKL_SWITCH),
    )


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
