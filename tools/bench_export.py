"""Measures what the project promises about speed and memory, on SmolLM2-135M.

Prints wall time and peak memory of ``export --merge --no-validate``, the time of ``--help`` and
that of a training step: medians of several runs. Memory is that of the whole process
tree (measured_process.py).
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from measured_process import Measured, run_measured
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "smollm2-135m"
DATA = ROOT / "tools" / "demo_data" / "train.jsonl"
TRAIN_STEPS = 7  # the first one, which builds Paddle's kernels, is not counted
MIB = 1024 * 1024


class StepTimes:
    """A progress display that notes when each training step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._training = False

    def phase(self, title: str, total: int | None = None, unit: str = "") -> None:
        self._training = unit == "steps"
        self.times = [time.perf_counter()] if self._training else self.times

    def advance(self, amount: int = 1, item: str = "") -> None:
        if self._training:
            self.times.append(time.perf_counter())


def training_steps(folder: Path) -> list[float]:
    """Seconds of single training steps: 4 of the demo's examples each, in float32."""
    from peft_deploy.environment import require_paddle

    require_paddle("the benchmark")
    from peft_deploy.training import TrainOptions, train

    progress = StepTimes()
    options = TrainOptions(base=MODEL, data=DATA, output=folder / "a", max_steps=TRAIN_STEPS)
    train(options, progress)
    return [after - before for before, after in itertools.pairwise(progress.times[1:])]


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="runs of which the median is taken")
    parser.add_argument("--adapter", type=Path, help="default: one that is trained here")
    arguments = parser.parse_args()
    make_model()
    tool = [sys.executable, "-m", "peft_deploy"]
    with tempfile.TemporaryDirectory(prefix="peft-deploy-bench-") as scratch:
        steps = training_steps(Path(scratch))
        adapter = arguments.adapter or Path(scratch) / "a"
        bundle = [f"{scratch}/bundle", "--force"]
        export = ["export", "--base", str(MODEL), "--adapter", str(adapter), "--merge"]
        command = [*tool, *export, "--no-validate", "--output", *bundle]
        exports = [run_measured(command, cwd=ROOT) for _ in range(arguments.runs)]
        helps = [run_measured([*tool, "--help"], cwd=ROOT).seconds for _ in range(arguments.runs)]
    show(exports, helps, steps)
    return 0


def make_model() -> None:
    """Makes SmolLM2-135M with its recipe, unless it is there."""
    spec = importlib.util.spec_from_file_location("make_smollm2", MODEL / "make.py")
    assert spec is not None and spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    recipe.make(say=lambda line: print(line, file=sys.stderr))


def show(exports: list[Measured], helps: list[float], steps: list[float]) -> None:
    """Prints the table."""
    median: Callable[[list[float]], float] = statistics.median
    table = Table(title=f"SmolLM2-135M on {os.cpu_count()} cores, medians")
    table.add_column("what")
    table.add_column("measured", justify="right")
    table.add_column("runs", justify="right")
    rows = [
        ("export --merge --no-validate", median([e.seconds for e in exports]), "s", exports),
        (
            "  peak of the process tree",
            median([e.tree_peak / MIB for e in exports]),
            "MiB",
            exports,
        ),
        ("  largest single process", median([e.largest / MIB for e in exports]), "MiB", exports),
        ("--help", median(helps), "s", helps),
        ("one training step of 4 examples", median(steps), "s", steps),
    ]
    for what, value, unit, runs in rows:
        form = f"{value:,.0f}" if unit == "MiB" else f"{value:.2f}"
        table.add_row(what, f"{form} {unit}", str(len(runs)))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
