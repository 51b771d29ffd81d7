"""Whether the bundle writes the text that the reference would write.

The bundle generates, with its cache and in a padded batch, as it does when it is used. The
reference then reads each prompt with the bundle's tokens behind it, alone and in one call, and so
says at every step which token it would have taken there. Where each of them is the bundle's, both
generate the same text, step by step; and beyond a tie, where two free generations have nothing in
common any more, the steps that follow are still checked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from peft_deploy.errors import ExecutionError, ParityError
from peft_deploy.parity.cases import Text
from peft_deploy.parity.generation_result import Divergence, GenerationResult, PromptResult
from peft_deploy.parity.play import read_text
from peft_deploy.parity.tolerance import Limit
from peft_deploy.progress import Progress
from peft_deploy.runtime import (
    Cache,
    CachingRunner,
    EncoderDecoderRunner,
    GenerationOptions,
    Runner,
    caching,
    generate,
)
from peft_deploy.runtime.runner import Array
from peft_deploy.signature import GraphSignature
from peft_deploy.text.padding import pad_batch

IntArray = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

RIVALS = 32  # tokens of a step whose logits are kept; noise never reaches that many


@dataclass(frozen=True)
class Prompt:
    """What to continue.

    Args:
        text: for the report.
        ids: its tokens.
        source: what an encoder reads before; None for a model of one graph.
    """

    text: str
    ids: tuple[int, ...]
    source: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class Scores:
    """What the reference thinks of the next token, at each step of one continuation.

    Args:
        tokens: the tokens that it was given, [N].
        ids: its best tokens, the best first, and behind them the given one, [N, R].
        values: their logits, [N, R].
        scale: the largest magnitude of a step's logits, [N].
    """

    tokens: IntArray
    ids: IntArray
    values: Floats
    scale: Floats


Judge = Callable[[Prompt, IntArray], Scores]


class Recorder:
    """Passes steps on to a runner, and looks at the logits that every token is chosen from.

    Args:
        runner: computes the steps.
        progress: advances by one for each step.
    """

    def __init__(self, runner: Runner | CachingRunner, progress: Progress) -> None:
        self._runner: CachingRunner = caching(runner)
        self._progress = progress
        self._steps = 0

    @property
    def signature(self) -> GraphSignature:
        """The runner's."""
        return self._runner.signature

    def load_cache(self, arrays: Sequence[Array]) -> Cache:
        """The runner's."""
        return self._runner.load_cache(arrays)

    def step(self, feeds: Mapping[str, Array], cache: Cache) -> tuple[Array, Cache]:
        """The runner's.

        Raises:
            ExecutionError: a logit is not a number, so that no token can be chosen.
        """
        logits, grown = self._runner.step(feeds, cache)
        if np.isnan(logits[:, -1]).any():
            raise ExecutionError(f"the logits of token {self._steps} are not numbers")
        self._steps += 1
        self._progress.advance(1)
        return logits, grown


def generate_greedily(
    runner: Runner, prompts: Sequence[Prompt], new_tokens: int, progress: Progress
) -> IntArray:
    """Continues all prompts in one left-padded batch, with the loop that bundles are used with.

    End tokens do not end it: what comes after them is as good for a comparison as anything.

    Returns:
        Tokens [B, N].

    Raises:
        ExecutionError: the graph does not run, or gives a NaN.
    """
    recorder = Recorder(_reading(runner, prompts), progress)
    options = GenerationOptions(max_new_tokens=new_tokens, pad_id=prompts[0].ids[0])
    results = generate(recorder, [prompt.ids for prompt in prompts], options)
    return np.array([result.token_ids for result in results], np.int64)


def _reading(runner: Runner, prompts: Sequence[Prompt]) -> Runner | CachingRunner:
    """The runner with the prompts' sources before its eyes, where it reads any."""
    if not isinstance(runner, EncoderDecoderRunner):
        return runner
    sources = [prompt.source or () for prompt in prompts]
    batch = pad_batch(sources, prompts[0].ids[0], "left")
    return runner.reading(batch.input_ids, batch.attention_mask)


def score_tokens(reference: Runner, prompt: Prompt, tokens: IntArray) -> Scores:
    """What the reference thinks of each of a prompt's new tokens, from one call.

    Args:
        reference: the model that was trained.
        prompt: its tokens come first.
        tokens: the new ones, [N].

    Raises:
        ParityError: the reference gives NaN or infinite logits.
    """
    ids = np.concatenate([np.asarray(prompt.ids, np.int64), tokens[:-1]])
    source = None if prompt.source is None else np.asarray(prompt.source, np.int64)
    text = Text(prompt.text, ids, source=source)
    logits = read_text(reference, text).logits[0, len(prompt.ids) - 1 :]
    if bad := int(np.count_nonzero(~np.isfinite(logits))):
        raise ParityError(
            f"the reference model gives {bad} NaN or infinite logits after {prompt.text!r}; no "
            "token can be compared with them",
            hint="look for NaN in the base model or the adapter: peft-deploy inspect",
        )
    best = np.concatenate([_best(logits, RIVALS), tokens[:, None]], axis=1)
    return Scores(
        tokens=tokens,
        ids=best,
        values=np.take_along_axis(logits, best, axis=1).astype(np.float32),
        scale=np.abs(logits).max(-1).astype(np.float32),
    )


def _best(logits: Floats, count: int) -> IntArray:
    """The best tokens of each step, [N, count]; among equals the lowest first, as in argmax."""
    count = min(count, logits.shape[1])
    kept = np.sort(np.argpartition(-logits, count - 1, axis=1)[:, :count], axis=1)
    order = np.argsort(-np.take_along_axis(logits, kept, axis=1), axis=1, kind="stable")
    return np.take_along_axis(kept, order, axis=1)


def compare_generation(
    judge: Judge,
    bundle: Runner,
    prompts: Sequence[Prompt],
    new_tokens: int,
    limit: Limit,
    progress: Progress,
) -> GenerationResult:
    """The bundle's greedy text, and where the reference would have written something else.

    Args:
        judge: gives what the reference thinks of a prompt's new tokens.
        bundle: the exported model.
        prompts: at least one.
        new_tokens: of each prompt.
        limit: of the logits. Each side may be that far from the exact logit, so that a gap of
            twice the limit can be closed by noise.
        progress: advances by one for each token of the bundle, and for each prompt.
    """
    start = time.perf_counter()
    try:
        have = generate_greedily(bundle, prompts, new_tokens, progress)
    except ExecutionError as exc:
        return GenerationResult((), problem=str(exc))
    seconds = time.perf_counter() - start
    results = []
    for prompt, tokens in zip(prompts, have, strict=True):
        results.append(compare_tokens(prompt, tokens, judge(prompt, tokens), limit))
        progress.advance(1, prompt.text)
    return GenerationResult(tuple(results), seconds=seconds)


def compare_tokens(prompt: Prompt, have: IntArray, scores: Scores, limit: Limit) -> PromptResult:
    """One prompt's new tokens against what the reference thinks of them.

    The scores belong to tokens that the reference was given; they say something about the bundle's
    for as long as those are the same, and about the first that is not.

    Args:
        prompt: for the report.
        have: the bundle's tokens, [N].
        scores: the reference's.
        limit: of the logits.
    """
    apart = np.flatnonzero(have != scores.tokens)
    comparable = int(apart[0]) + 1 if apart.size else len(have)
    wanted = scores.ids[:, 0]
    different = np.flatnonzero(have[:comparable] != wanted[:comparable])
    found = [_divergence(int(step), int(have[step]), scores, limit) for step in different]
    broken = next((d for d in found if not d.is_tie), None)
    return PromptResult(
        prompt.text,
        tuple(wanted.tolist()),
        tuple(have.tolist()),
        broken or next(iter(found), None),
        compared=comparable,
    )


def _divergence(step: int, actual: int, scores: Scores, limit: Limit) -> Divergence:
    ids, values = scores.ids[step], scores.values[step]
    known = np.flatnonzero(ids == actual)
    # a token that is not among the best is at least as far behind as the last of them
    value = values[known[0]] if known.size else values[:RIVALS].min()
    return Divergence(
        step=step,
        expected=int(ids[0]),
        actual=actual,
        gap=float(values[0] - value),
        margin=float(values[0] - values[1]),
        noise=2 * limit.maximum * float(scores.scale[step]),
    )
