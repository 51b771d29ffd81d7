"""One process a contender, and the rounds in which all of them are measured in turn."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers.contenders import Contender

CHUNK = 8  # decoding steps of one contender before it is the next one's turn


@dataclass
class Record:
    """What was measured of one lane, in the order of the rounds; lanes have equally many entries.

    Args:
        name: of the lane, without its precision.
        precision: of the lane.
        prefill: seconds of each prompt.
        decode: seconds of a step, the median of each chunk.
        tokens: that were generated.
        load: seconds of each loading.
        memory: the most that its process was, in bytes.
    """

    name: str
    precision: str
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    load: list[float] = field(default_factory=list)
    memory: int = 0


class WorkerError(Exception):
    """A contender could not be run."""


class Worker:
    """A contender's process."""

    def __init__(
        self,
        contender: Contender,
        folder: Path,
        threads: int,
        most: int,
        environment: Mapping[str, str],
    ) -> None:
        adapters = [f"--adapter={n}={folder / file}" for n, file in contender.adapters.items()]
        command = [sys.executable, "-m", "peers.worker", contender.loop, str(folder), *adapters]
        command += ["--threads", str(threads), "--most", str(most)]
        self.contender = contender
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Does one thing.

        Raises:
            WorkerError: it failed, or the process is gone.
        """
        who = str(self)
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(f"{who}: the process ended") from None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f"{who}: the process ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{who}: {answer['error']}")
        return answer

    def __str__(self) -> str:
        return f"{self.contender.name} {self.contender.precision}"

    def stop(self) -> None:
        """Ends the process."""
        self._process.terminate()
        self._process.wait()


@dataclass(frozen=True)
class Lane:
    """One variant of a contender, its process and its record."""

    worker: Worker
    variant: str
    record: Record


def lanes_of(workers: Sequence[Worker]) -> list[Lane]:
    """All variants of all workers."""
    return [
        Lane(worker, variant, Record(name, worker.contender.precision))
        for worker in workers
        for variant, name in worker.contender.variants.items()
    ]


def load_all(lanes: Sequence[Lane], prompt: Sequence[int]) -> dict[str, str]:
    """Loads every contender and generates two tokens with it.

    Returns:
        Who failed, and how, of those that are not required.

    Raises:
        WorkerError: one that is required failed.
    """
    failed = ((w, _failure_of_loading(w, own, prompt)) for w, own in _by_worker(lanes))
    return {str(worker): f"does not run here: {exc}" for worker, exc in failed if exc is not None}


def _failure_of_loading(
    worker: Worker, lanes: Sequence[Lane], prompt: Sequence[int]
) -> WorkerError | None:
    try:
        _load(worker, lanes, prompt)
    except WorkerError as exc:
        if worker.contender.required:
            raise
        return exc
    return None


def _load(worker: Worker, lanes: Sequence[Lane], prompt: Sequence[int]) -> None:
    seconds = worker.ask("load")["seconds"]
    for lane in lanes:
        worker.ask("start", variant=lane.variant, prompt=list(prompt))
        worker.ask("decode", variant=lane.variant, steps=1)
        lane.record.load.append(seconds)


def measure(lanes: Sequence[Lane], prompt: Sequence[int], rounds: int, steps: int) -> None:
    """Fills the records.

    A round reads the prompt with every lane in turn, then lets every lane decode a few steps in turn until ``steps``
    are done, so that whatever else the machine does falls on all of them alike. Each round begins with another lane,
    and with every contender loaded anew: where its weights come to lie in memory makes decoding up to a tenth faster
    or slower. One more round goes before them, which does not count; its tokens do, as all rounds give the same.
    """
    for turn in range(rounds + 1):
        for worker, own in _by_worker(lanes) if turn else ():
            _load(worker, own, prompt)
        order = [*lanes[turn % len(lanes) :], *lanes[: turn % len(lanes)]]
        for lane in order:
            answer = lane.worker.ask("start", variant=lane.variant, prompt=list(prompt))
            if turn == 0:
                lane.record.tokens.append(answer["token"])
            else:
                lane.record.prefill.append(answer["seconds"])
        for _ in range(steps // CHUNK):
            for lane in order:
                answer = lane.worker.ask("decode", variant=lane.variant, steps=CHUNK)
                if turn == 0:
                    lane.record.tokens += answer["tokens"]
                else:
                    lane.record.decode.append(sorted(answer["seconds"])[CHUNK // 2])
    for worker, own in _by_worker(lanes):
        memory = worker.ask("memory")["bytes"]
        for lane in own:
            lane.record.memory = memory


def _by_worker(lanes: Sequence[Lane]) -> Iterator[tuple[Worker, list[Lane]]]:
    for worker in dict.fromkeys(lane.worker for lane in lanes):
        yield worker, [lane for lane in lanes if lane.worker is worker]
