"""How much memory generating with one bundle takes: that of a process which does nothing else.

In the process that measures speeds all bundles are open at once, and what one of them frees the next one uses, so each
lane is run once more, in a process of its own (``python -m peft_deploy.workflows.bench_memory``).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from peft_deploy.config.bench import BenchOptions
from peft_deploy.errors import ExecutionError
from peft_deploy.progress import Silent
from peft_deploy.workflows.bench_generation import RandomGeneration
from peft_deploy.workflows.bench_lanes import Lane, open_lanes

STATUS = Path("/proc/self/status")
_ANSWER = "peft-deploy bench memory: "  # begins the line that counts, whatever else packages print


def peak_memory(lane: Lane, options: BenchOptions) -> list[int] | None:
    """The most memory that a process running only this lane ever had, in bytes.

    Args:
        lane: what is run.
        options: with the sizes; one generation of each.

    Returns:
        One number for each of the options' sizes; None where the system does not say. A size that
        needs less than a smaller one before it gets the larger number.

    Raises:
        ExecutionError: the process failed.
    """
    if not STATUS.is_file():
        return None
    chosen = replace(options, adapters=(lane.adapter,) if lane.adapter else ())
    request = {"folder": str(lane.folder), "adapter": lane.adapter, "options": asdict(chosen)}
    command = [sys.executable, "-m", "peft_deploy.workflows.bench_memory", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    answers = [line for line in done.stdout.splitlines() if line.startswith(_ANSWER)]
    if done.returncode or not answers:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise ExecutionError(
            f"the process that measures the memory of {lane.name} ended with {done.returncode}: {last}"
        )
    peaks: list[int] = json.loads(answers[-1].removeprefix(_ANSWER))
    return peaks


def _peak() -> int:
    """The most memory that this process ever had, in bytes."""
    lines = STATUS.read_text("ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def main(arguments: Sequence[str]) -> None:
    """Runs one lane at all sizes, the smallest first, and prints the peaks in the order of the options."""
    request = json.loads(arguments[0])
    given: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in request["options"].items()
    }
    options = BenchOptions(**given)
    lanes = open_lanes([Path(request["folder"])], options, Silent())
    # Adapters are loaded one after the other, and those that come later not at all.
    lane = next(lane for lane in lanes if lane.adapter == request["adapter"])
    peaks: dict[tuple[int, int], int] = {}
    for batch, length in sorted(options.sizes, key=lambda size: size[0] * size[1]):
        run = RandomGeneration(lane.runner, batch, length)
        run.prefill()
        for _ in range(options.new_tokens):
            run.decode()
        peaks[batch, length] = _peak()
    sys.stdout.write(f"\n{_ANSWER}{json.dumps([peaks[size] for size in options.sizes])}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
