"""Measures the export of a model that is larger than memory against copying its checkpoint.

    python tools/random_llama.py /scratch/7b
    python tools/bench_large.py /scratch/7b [--precision fp16] [--precision int4] [--runs N] [--json FILE]

Copies FOLDER/base (cp -r), exports it with FOLDER/adapter merged and without the check, and does both in turn, as
often as was asked for; outputs are removed again. Either is over when its bytes are on the disk: the time is that of
the command and of a `sync` of the disk afterwards. Before each of them the disk is idle, and the checkpoint is out
of the page cache, where the system lets it be dropped (posix_fadvise).

Memory is sampled every 20 ms: resident pages of the exporting process, of its child that traces and converts, and of
both together at one time; of these, those that belong to no file are shown, too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from measured_process import process_tree, resident
from rich.console import Console
from rich.table import Table

SAMPLING_SECONDS = 0.02
MIB = 1024 * 1024
GB = 10**9


@dataclass
class Run:
    """One command, measured.

    Args:
        name: of what was run.
        seconds: until the command ended.
        synced: until everything was on the disk, too.
        written: bytes of its output.
        peaks: whose memory → its peak, in bytes.
        phases: of an export, in seconds.
    """

    name: str
    seconds: float = 0.0
    synced: float = 0.0
    written: int = 0
    peaks: dict[str, int] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)


def run(name: str, command: list[str], source: Path, output: Path) -> Run:
    """Runs a command that reads ``source`` and writes ``output``, which is removed.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    _drop_cached(source)
    result, start = Run(name), time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    while process.poll() is None:
        _sample(process.pid, result.peaks)
        time.sleep(SAMPLING_SECONDS)
    result.seconds = time.perf_counter() - start
    os.sync()
    result.synced = time.perf_counter() - start
    text = process.stdout.read() if process.stdout else b""
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, text)
    if text:
        result.phases = json.loads(text).get("seconds", {})
    result.written = sum(p.stat().st_size for p in output.rglob("*") if p.is_file())
    shutil.rmtree(output)
    return result


def _drop_cached(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _sample(parent: int, peaks: dict[str, int]) -> None:
    _, *children = process_tree(parent)
    for kind, key in (("resident", "VmRSS"), ("own", "RssAnon")):
        own, others = resident(parent, key), sum(resident(pid, key) for pid in children)
        for who, size in (("parent", own), ("child", others), ("together", own + others)):
            name = f"{who}, {kind}"
            peaks[name] = max(peaks.get(name, 0), size)


def export_command(model: Path, precision: str, output: Path) -> list[str]:
    """What a user types, without the check."""
    adapter = ["--adapter", str(model / "adapter"), "--merge", "--precision", precision]
    command = [sys.executable, "-m", "peft_deploy", "export", "--base", str(model / "base")]
    return [*command, *adapter, "--no-validate", "--json", "--output", str(output)]


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="what tools/random_llama.py made")
    parser.add_argument("--precision", action="append", help="default: fp16")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--output", type=Path, help="scratch folder on the same disk")
    parser.add_argument(
        "--json", type=Path, help="write the figures there, too, in bytes and seconds"
    )
    parser.add_argument("--no-copy", action="store_true", help="measure the exports only")
    arguments = parser.parse_args()
    model, precisions = arguments.model, arguments.precision or ["fp16"]
    output = arguments.output or model / "measured"
    copy = ["cp", "-r", str(model / "base"), str(output)]
    jobs = [] if arguments.no_copy else [("cp -r", copy)]
    jobs += [(f"export {p}", export_command(model, p, output)) for p in precisions]
    runs = []
    for name, command in [job for _ in range(arguments.runs) for job in jobs]:
        runs.append(run(name, command, model, output))
        if arguments.json:  # after each: they take long
            arguments.json.write_text(json.dumps([asdict(r) for r in runs], indent=2) + "\n")
    show(runs)
    return 0


def show(runs: list[Run]) -> None:
    """Prints the table."""
    table = Table(title=f"on {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for column in ("what", "seconds", "with sync", "written, GB"):
        table.add_column(column)
    peaks = list(runs[-1].peaks)
    for name in peaks:
        table.add_column(f"{name}, MiB", justify="right")
    for r in runs:
        sizes = (f"{r.peaks[name] / MIB:,.0f}" for name in peaks)
        table.add_row(
            r.name, f"{r.seconds:.1f}", f"{r.synced:.1f}", f"{r.written / GB:.2f}", *sizes
        )
    console = Console(width=160)
    console.print(table)
    for r in runs:
        if r.phases:
            console.print(r.name, {k: round(v, 1) for k, v in r.phases.items()})


if __name__ == "__main__":
    sys.exit(main())
