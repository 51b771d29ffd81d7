"""The process of one contender. It does what its standard input says, one JSON object a line, and answers likewise.

    {"do": "load"}                                          → {"seconds": …}: ready to run; again, when it was
    {"do": "start", "variant": NAME, "prompt": [TOKENS]}    → {"seconds": …, "token": …}
    {"do": "decode", "variant": NAME, "steps": N}           → {"seconds": [a step], "tokens": [a step]}
    {"do": "memory"}                                        → {"bytes": …}: the most that it ever was

Times are taken here, so that the way of a message does not count. What fails is answered with {"error": …}.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measured_process import resident


def opener(arguments: argparse.Namespace) -> Callable[[], Any]:
    """Imports what the loop needs, which is not part of loading, and gives what makes one."""
    folder, threads = arguments.folder, arguments.threads
    if arguments.loop == "onnx":
        from peers.onnx_loop import OnnxLoop

        adapters = dict(entry.split("=", 1) for entry in arguments.adapter)
        paths = {name: Path(path) for name, path in adapters.items()}
        return lambda: OnnxLoop(folder, threads, paths, arguments.most)
    from peers.paddle_loops import EagerLoop, InferenceLoop
    from peft_deploy.environment import require_paddle

    require_paddle("the comparison")
    kind = EagerLoop if arguments.loop == "eager" else InferenceLoop
    return lambda: kind(folder, threads)


class Worker:
    """Answers requests."""

    def __init__(self, open_loop: Callable[[], Any]) -> None:
        self._open, self._loop = open_loop, None

    def load(self) -> dict[str, Any]:
        self._loop = None
        gc.collect()
        start = time.perf_counter()
        self._loop = self._open()
        return {"seconds": time.perf_counter() - start}

    def start(self, variant: str, prompt: list[int]) -> dict[str, Any]:
        seconds, token = _timed(lambda: self._loop.start(variant, prompt))
        return {"seconds": seconds, "token": token}

    def decode(self, variant: str, steps: int) -> dict[str, Any]:
        runs = [_timed(lambda: self._loop.decode(variant)) for _ in range(steps)]
        return {"seconds": [s for s, _ in runs], "tokens": [token for _, token in runs]}

    def memory(self) -> dict[str, Any]:
        return {"bytes": resident("self", "VmHWM")}


def _timed(call: Callable[[], int]) -> tuple[float, int]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("loop", choices=["onnx", "eager", "inference"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--most", type=int, required=True, help="tokens of a generation")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=FILE")
    # Packages print as they like; answers go where standard output was.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker(opener(parser.parse_args()))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as exc:  # whatever the graph or its runtime does
            answer = {"error": f"{type(exc).__name__}: {exc}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
