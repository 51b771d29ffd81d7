"""How fast bundles are: prefill, decoding, time to the first token, side by side in one interleaved run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peft_deploy.config.bench import BenchOptions
from peft_deploy.errors import ConfigError
from peft_deploy.progress import Progress, Silent
from peft_deploy.runtime import CachingRunner, caching, initial_cache
from peft_deploy.runtime.runner import Array
from peft_deploy.signature import ATTENTION_MASK, INPUT_IDS, POSITION_IDS
from peft_deploy.workflows.bench_lanes import Lane, open_lanes

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
    """

    lane: str
    batch: int
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    prefill_ratio: float
    decode_ratio: float

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
                "memory_bytes": lane.memory,
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
    sizes = [(batch, n) for batch in options.batches for n in options.prompt_tokens]
    rounds = options.rounds + 1  # the first one, which allocates, is not counted
    progress.phase("Measuring", len(sizes) * rounds * len(lanes), "runs")
    speeds = [s for size in sizes for s in _measure(lanes, size, options, progress)]
    return BenchReport(lanes, tuple(speeds), options)


def _measure(
    lanes: Sequence[Lane], size: tuple[int, int], options: BenchOptions, progress: Progress
) -> Iterator[Speed]:
    batch, length = size
    prefill = np.empty((options.rounds + 1, len(lanes)))
    decode = np.empty_like(prefill)
    for turn in range(options.rounds + 1):
        for column, lane in enumerate(lanes):
            run = _Run(lane.runner, batch, length)
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


class _Run:
    """One generation with random tokens: what is fed does not matter to the speed, how much does."""

    def __init__(self, runner: Any, batch: int, length: int) -> None:
        self._runner: CachingRunner = caching(runner)
        signature = self._runner.signature
        self._names = set(signature.input_names)
        self._batch, self._length, self._total = batch, length, 0
        self._rng = np.random.default_rng(0)
        self._cache = self._runner.load_cache(initial_cache(signature, batch))

    def prefill(self) -> None:
        """Reads the prompt."""
        self._step(self._length)

    def decode(self) -> None:
        """One new token a row."""
        self._step(1)

    def _step(self, new: int) -> None:
        first, self._total = self._total, self._total + new
        places = np.arange(first, self._total, dtype=np.int64)
        feeds: dict[str, Array] = {
            INPUT_IDS: self._rng.integers(0, self._vocab, (self._batch, new), dtype=np.int64),
            ATTENTION_MASK: np.ones((self._batch, self._total), np.int64),
            POSITION_IDS: np.tile(places, (self._batch, 1)),
        }
        feeds = {name: array for name, array in feeds.items() if name in self._names}
        _, self._cache = self._runner.step(feeds, self._cache)

    @property
    def _vocab(self) -> int:
        size = self._runner.signature.outputs[0].dims[-1]
        assert isinstance(size, int)
        return size
