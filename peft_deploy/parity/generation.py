"""Whether both sides write the same text."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from peft_deploy.errors import ExecutionError
from peft_deploy.parity.report import Divergence, GenerationResult, PromptResult
from peft_deploy.parity.tolerance import Limit
from peft_deploy.progress import Progress
from peft_deploy.runtime import Cache, CachingRunner, GenerationOptions, Runner, caching, generate
from peft_deploy.runtime.runner import Array
from peft_deploy.signature import GraphSignature

IntArray = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Prompt:
    """What to continue.

    Args:
        text: for the report.
        ids: its tokens.
    """

    text: str
    ids: tuple[int, ...]


class Recorder:
    """Passes steps on to a runner, and keeps the logits that every token is chosen from.

    Args:
        runner: computes the steps.
        progress: advances by one for each step.
    """

    def __init__(self, runner: Runner, progress: Progress) -> None:
        self._runner: CachingRunner = caching(runner)
        self._progress = progress
        self._steps: list[Floats] = []

    @property
    def signature(self) -> GraphSignature:
        """The runner's."""
        return self._runner.signature

    @property
    def logits(self) -> Floats:
        """[B, N, V], of N steps on a left-padded batch."""
        return np.stack(self._steps, axis=1)

    def load_cache(self, arrays: Sequence[Array]) -> Cache:
        """The runner's."""
        return self._runner.load_cache(arrays)

    def step(self, feeds: Mapping[str, Array], cache: Cache) -> tuple[Array, Cache]:
        """The runner's, noted down."""
        logits, grown = self._runner.step(feeds, cache)
        self._steps.append(logits[:, -1].astype(np.float32))
        self._progress.advance(1)
        return logits, grown


def generate_greedily(
    runner: Runner, prompts: Sequence[Prompt], new_tokens: int, progress: Progress
) -> tuple[IntArray, Floats]:
    """Continues all prompts in one left-padded batch, with the loop that bundles are used with.

    End tokens do not end it: what comes after them is as good for a comparison as anything.

    Returns:
        Tokens [B, N], and the logits [B, N, V] that they were chosen from.

    Raises:
        ExecutionError: the graph does not run.
    """
    recorder = Recorder(runner, progress)
    options = GenerationOptions(max_new_tokens=new_tokens, pad_id=prompts[0].ids[0])
    results = generate(recorder, [prompt.ids for prompt in prompts], options)
    return np.array([result.token_ids for result in results], np.int64), recorder.logits


def compare_generation(
    reference: Runner,
    bundle: Runner,
    prompts: Sequence[Prompt],
    new_tokens: int,
    limit: Limit,
    progress: Progress,
) -> GenerationResult:
    """Greedy text on both sides, and where it parts.

    Args:
        reference: the model that was trained.
        bundle: the exported one.
        prompts: at least one.
        new_tokens: of each prompt.
        limit: of the logits. Each side may be that far from the exact logit, so that a gap of
            twice the limit can be closed by noise.
        progress: advances by one for each token of each side.
    """
    want, logits = generate_greedily(reference, prompts, new_tokens, progress)
    start = time.perf_counter()
    try:
        have, _ = generate_greedily(bundle, prompts, new_tokens, progress)
    except ExecutionError as exc:
        return GenerationResult((), problem=str(exc))
    seconds = time.perf_counter() - start
    results = (
        PromptResult(
            prompt.text,
            tuple(want[row].tolist()),
            tuple(have[row].tolist()),
            _divergence(logits[row], want[row], have[row], limit),
        )
        for row, prompt in enumerate(prompts)
    )
    return GenerationResult(tuple(results), seconds=seconds)


def _divergence(logits: Floats, want: IntArray, have: IntArray, limit: Limit) -> Divergence | None:
    """The first difference of one prompt's tokens [N], given the reference's logits [N, V]."""
    different = np.flatnonzero(want != have)
    if not different.size:
        return None
    step = int(different[0])
    scores = logits[step]
    second, first = np.partition(scores, -2)[-2:]
    return Divergence(
        step=step,
        expected=int(want[step]),
        actual=int(have[step]),
        gap=float(scores[want[step]] - scores[have[step]]),
        margin=float(first - second),
        noise=2 * limit.maximum * float(np.abs(scores).max()),
    )
