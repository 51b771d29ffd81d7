"""How fast bundles are: prefill, decoding, time to the first token, side by side in one interleaved run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from peft_deploy.config.bench import BenchOptions
from peft_deploy.errors import ConfigError
from peft_deploy.progress import Progress, Silent
from peft_deploy.workflows.bench_generation import RandomGeneration
from peft_deploy.workflows.bench_lanes import Lane, open_lanes
from peft_deploy.workflows.bench_memory import peak_memory

BASELINE = 0  # the lane that the others are compared with


@dataclass(frozen=True)
class Speed:
    """What one lane did at one batch and prompt size; medians over the rounds.

    Args:
        lane: the bundle's name, and the adapter's.
        batch: rows.
        prompt_tokens: of each row.
        prefill_seconds: of the whole prompt, which is the time to the first token.
        decode_seconds: of one step, all rows.
        prefill_ratio: this lane's prefill speed against the first lane's: the median of the rounds' ratios.
        decode_ratio: likewise for decoding.
        peak_memory: the most memory of a process that does only this, in bytes; None where the system does not say.
    """

    lane: str
    batch: int
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    prefill_ratio: float
    decode_ratio: float
    peak_memory: int | None = None

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens of all rows a second."""
        return self.batch * self.prompt_tokens / self.prefill_seconds

    @property
    def decode_tokens_per_second(self) -> float:
        """New tokens of all rows a second."""
        return self.batch / self.decode_seconds


@dataclass(frozen=True)
class BenchReport:
    """The results, in the order of the lanes within each size.

    Args:
        lanes: what was measured.
        speeds: one entry a lane, batch size and prompt size.
        options: how.
    """

    lanes: tuple[Lane, ...]
    speeds: tuple[Speed, ...]
    options: BenchOptions

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form of the report."""
        speeds = [
            {
                **asdict(speed),
                "prefill_tokens_per_second": round(speed.prefill_tokens_per_second, 3),
                "decode_tokens_per_second": round(speed.decode_tokens_per_second, 3),
            }
            for speed in self.speeds
        ]
        lanes = [
            {
                "name": lane.name,
                "load_seconds": round(lane.load_seconds, 3),
                "disk_bytes": lane.disk,
            }
            for lane in self.lanes
        ]
        return {"options": asdict(self.options), "lanes": lanes, "speeds": speeds}


def bench(
    bundles: Sequence[str | Path],
    *,
    options: BenchOptions | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measures bundles of decoders, all of them in one run, round by round.

    A round measures every lane once, in turn, so that what else the machine does falls on all of them alike;
    the ratios are taken within a round.

    Args:
        bundles: their folders; one with adapters is measured without and with each of them.
        options: sizes and rounds.
        progress: advances by one for each lane of each round.

    Raises:
        BundleError: a folder is no bundle.
        ConfigError: no bundle, an adapter that no bundle has, or a bundle that does not generate.
        ExecutionError: a graph does not run.
    """
    options, progress = options or BenchOptions(), progress or Silent()
    if not bundles:
        raise ConfigError("there is no bundle to measure")
    progress.phase("Opening the bundles", len(bundles), "bundles")
    lanes = tuple(open_lanes([Path(b).expanduser() for b in bundles], options, progress))
    rounds = options.rounds + 1  # the first one, which allocates, is not counted
    progress.phase("Measuring", len(options.sizes) * rounds * len(lanes), "runs")
    speeds = [s for size in options.sizes for s in _measure(lanes, size, options, progress)]
    return BenchReport(lanes, tuple(_with_memory(speeds, lanes, options, progress)), options)


def _with_memory(
    speeds: Sequence[Speed], lanes: Sequence[Lane], options: BenchOptions, progress: Progress
) -> Iterator[Speed]:
    progress.phase("Measuring memory", len(lanes), "bundles")
    peaks: dict[tuple[str, int, int], int] = {}
    for lane in lanes:
        most = peak_memory(lane, options)
        if most is not None:
            peaks |= {(lane.name, *size): n for size, n in zip(options.sizes, most, strict=True)}
        progress.advance(1, lane.name)
    for speed in speeds:
        peak = peaks.get((speed.lane, speed.batch, speed.prompt_tokens))
        yield replace(speed, peak_memory=peak)


def _measure(
    lanes: Sequence[Lane], size: tuple[int, int], options: BenchOptions, progress: Progress
) -> Iterator[Speed]:
    batch, length = size
    prefill = np.empty((options.rounds + 1, len(lanes)))
    decode = np.empty_like(prefill)
    for turn in range(options.rounds + 1):
        for column, lane in enumerate(lanes):
            run = RandomGeneration(lane.runner, batch, length)
            prefill[turn, column] = _seconds(run.prefill)
            steps = [_seconds(run.decode) for _ in range(options.new_tokens)]
            decode[turn, column] = statistics.median(steps)
            progress.advance(1, lane.name)
    prefill, decode = prefill[1:], decode[1:]
    for column, lane in enumerate(lanes):
        yield Speed(
            lane.name,
            batch,
            length,
            float(np.median(prefill[:, column])),
            float(np.median(decode[:, column])),
            float(np.median(prefill[:, BASELINE] / prefill[:, column])),
            float(np.median(decode[:, BASELINE] / decode[:, column])),
        )


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
