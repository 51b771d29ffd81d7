"""Token by token from prompts to results: one prefill, then one step a token with the cache."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from peft_deploy.bundle.prefixes import Prefix
from peft_deploy.errors import ConfigError, ExecutionError
from peft_deploy.runtime.caching import Cache, CachingRunner, caching, initial_cache
from peft_deploy.runtime.runner import Array, Runner
from peft_deploy.runtime.sampling import Sampling, Tokens, choose
from peft_deploy.signature import ATTENTION_MASK, INPUT_IDS, POSITION_IDS
from peft_deploy.text.padding import Side, pad_batch

FinishReason = Literal["stop", "length", "context"]


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """What a generation needs to know beside the prompts.

    Args:
        max_new_tokens: the most tokens that a row may get, its end token included.
        sampling: how tokens are chosen.
        stop_ids: tokens that end a row.
        pad_id: fills up rows of different length, and rows that ended before the others.
        padding: on which side of the prompts.
        context_length: the most tokens that the model can see, prompt and new ones together; None
            for no limit.

    Raises:
        ConfigError: fewer than one new token is asked for.
    """

    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: tuple[int, ...] = ()
    pad_id: int = 0
    padding: Side = "left"
    context_length: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")


@dataclass(frozen=True)
class NewToken:
    """One token of one row, as it comes.

    Args:
        row: index of the prompt.
        token: its id.
        finish_reason: why the row ends with this token; None while it goes on.
    """

    row: int
    token: int
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class Generation:
    """What became of one prompt.

    Args:
        token_ids: the new tokens, an end token included.
        text: their text, without the end token and other special ones; None without a tokenizer.
        finish_reason: ``"stop"`` at an end token, ``"length"`` at ``max_new_tokens``,
            ``"context"`` where the model can see no more tokens.
        prompt_tokens: length of the prompt.
        prefill_seconds: until the first token, of the whole batch.
        decode_seconds: from the first token to the row's last.
    """

    token_ids: tuple[int, ...]
    text: str | None
    finish_reason: FinishReason
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of the tokens after the first; None when there is only one."""
        steps = len(self.token_ids) - 1
        return steps / self.decode_seconds if steps and self.decode_seconds > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form of the result."""
        speed = self.tokens_per_second
        return {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "prefill_seconds": round(self.prefill_seconds, 6),
            "decode_seconds": round(self.decode_seconds, 6),
            "tokens_per_second": None if speed is None else round(speed, 3),
        }


class GenerationRun:
    """A generation under way: iterate over it for the tokens as they come, then read
    :attr:`results`.

    Args:
        runner: computes the logits.
        prompts: token ids of each row.
        options: everything else.
        prefix: every row begins after it; or cache input → [1, K, P, D] or [B, K, P, D], which
            does not move positions. It counts in the attention mask and in the context length.

    Raises:
        ConfigError: an empty prompt, or one that leaves no room for a new token.
        ExecutionError: the graph cannot generate, or the prefix does not fit it.
    """

    def __init__(
        self,
        runner: Runner | CachingRunner,
        prompts: Sequence[Sequence[int]],
        options: GenerationOptions,
        prefix: Prefix | Mapping[str, Array] | None = None,
    ) -> None:
        self._runner = caching(runner)
        self._options = options
        self._batch = pad_batch(prompts, options.pad_id, options.padding)
        if (
            runner.signature.last_logits
            and options.padding == "right"
            and len({*map(len, prompts)}) > 1
        ):
            raise ConfigError(
                "this bundle computes the logits of the last place only, where a prompt that is padded on the right "
                "has no token",
                hint="pad on the left",
            )
        self._lengths = self._batch.lengths  # [B], grows with the tokens
        self._prompt_lengths = self._lengths.copy()
        self._prefix = prefix.past if isinstance(prefix, Prefix) else prefix
        self._offset = prefix.position_offset if isinstance(prefix, Prefix) else 0
        self._limit = _room(self._lengths, options.context_length, self._prefix)
        self._generators = options.sampling.generators(len(prompts))
        self._tokens: list[list[int]] = [[] for _ in prompts]
        self._reasons: list[FinishReason | None] = [None for _ in prompts]
        self._ends = [0.0 for _ in prompts]  # clock reading of each row's last token
        self._first = 0.0  # clock reading of the first token
        self._prefill_seconds = 0.0
        self._events = self._generate()

    def __iter__(self) -> Iterator[NewToken]:
        """The tokens as they come, row by row within a step."""
        return self._events

    @property
    def results(self) -> list[Generation]:
        """One result a prompt, without text; runs whatever has not been iterated over."""
        for _ in self._events:
            pass
        return [
            Generation(
                token_ids=tuple(tokens),
                text=None,
                finish_reason=_known(reason),
                prompt_tokens=int(self._prompt_lengths[row]),
                prefill_seconds=self._prefill_seconds,
                decode_seconds=self._ends[row] - self._first,
            )
            for row, (tokens, reason) in enumerate(zip(self._tokens, self._reasons, strict=True))
        ]

    def _generate(self) -> Iterator[NewToken]:
        started = time.perf_counter()
        tokens, mask, cache = self._prefill()
        self._first = time.perf_counter()
        self._prefill_seconds = self._first - started
        yield from self._take(tokens)
        while None in self._reasons:
            tokens, mask, cache = self._decode(mask, cache)
            yield from self._take(tokens)

    def _prefill(self) -> tuple[Tokens, npt.NDArray[np.int64], Cache]:
        rows = len(self._tokens)
        past = initial_cache(self._runner.signature, rows, self._prefix)
        cache = self._runner.load_cache(past)
        ones = np.ones((rows, cache.length), np.int64)  # [B, P]
        mask = np.concatenate([ones, self._batch.attention_mask], axis=1)  # [B, P + S]
        places = self._batch.position_ids + self._offset
        logits, cache = self._step(self._batch.input_ids, mask, places, cache)
        width = logits.shape[1]
        right = self._options.padding == "right" and not self._runner.signature.last_logits
        last = self._lengths - 1 if right else np.full(rows, width - 1)
        return self._choose(logits[np.arange(rows), last]), mask, cache

    def _decode(
        self, mask: npt.NDArray[np.int64], cache: Cache
    ) -> tuple[Tokens, npt.NDArray[np.int64], Cache]:
        """One more token for every row; a row that has ended is fed padding, which nobody attends
        to.
        """
        going = np.array([reason is None for reason in self._reasons])  # [B]
        last = np.array([tokens[-1] for tokens in self._tokens])
        ids = np.where(going, last, self._options.pad_id)[:, None].astype(np.int64)  # [B, 1]
        places = np.where(going, self._lengths - 1, 0)[:, None].astype(np.int64)  # [B, 1]
        places += self._offset
        mask = np.concatenate([mask, going[:, None].astype(np.int64)], axis=1)  # [B, P + S]
        logits, cache = self._step(ids, mask, places, cache)
        return self._choose(logits[:, -1]), mask, cache

    def _step(self, ids: Array, mask: Array, places: Array, cache: Cache) -> tuple[Array, Cache]:
        feeds = {INPUT_IDS: ids, ATTENTION_MASK: mask, POSITION_IDS: places}
        wanted = self._runner.signature.input_names
        return self._runner.step({n: feeds[n] for n in feeds if n in wanted}, cache)

    def _choose(self, logits: Array) -> Tokens:
        return choose(logits.astype(np.float32), self._options.sampling, self._generators)

    def _take(self, tokens: Tokens) -> Iterator[NewToken]:
        """Notes the new token of every row that is still going."""
        now = time.perf_counter()
        events = []
        for row, reason in enumerate(self._reasons):
            if reason is None:
                self._tokens[row].append(int(tokens[row]))
                self._lengths[row] += 1
                self._ends[row] = now
                self._reasons[row] = self._reason(row)
                events.append(NewToken(row, int(tokens[row]), self._reasons[row]))
        return iter(events)

    def _reason(self, row: int) -> FinishReason | None:
        if self._tokens[row][-1] in self._options.stop_ids:
            return "stop"
        if len(self._tokens[row]) >= self._options.max_new_tokens:
            return "length"
        full = self._limit is not None and self._lengths[row] >= self._limit
        return "context" if full else None


def generate(
    runner: Runner | CachingRunner,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    prefix: Prefix | Mapping[str, Array] | None = None,
) -> list[Generation]:
    """The results of all prompts, generated as one batch; see :class:`GenerationRun`."""
    return GenerationRun(runner, prompts, options, prefix).results


def _room(
    lengths: npt.NDArray[np.int64], limit: int | None, prefix: Mapping[str, Array] | None
) -> int | None:
    """The most tokens that a row can have behind the prefix, prompt and new ones together.

    Raises:
        ConfigError: a prompt has that many already.
    """
    if limit is None:
        return None
    taken = 0
    if prefix:
        taken = int(next(iter(prefix.values())).shape[2])
    if int(lengths.max()) >= limit - taken:
        row = int(lengths.argmax())
        behind = f" and the prefix {taken}" if taken else ""
        raise ConfigError(
            f"prompt {row} has {int(lengths[row])} tokens{behind}; the model can see {limit}, new "
            f"ones included",
            hint="shorten the prompt",
        )
    return limit - taken


def _known(reason: FinishReason | None) -> FinishReason:
    if reason is None:
        raise ExecutionError("the generation was broken off before all rows had ended")
    return reason
