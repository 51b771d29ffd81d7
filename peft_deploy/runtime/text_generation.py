"""Generation from text to text: prompts encoded, new tokens decoded as they come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from peft_deploy.bundle.prefixes import Prefix
from peft_deploy.runtime.caching import CachingRunner
from peft_deploy.runtime.generation import (
    Generation,
    GenerationOptions,
    GenerationRun,
    NewToken,
)
from peft_deploy.runtime.runner import Array, Runner
from peft_deploy.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextPiece:
    """A piece of one row's text, whole characters only.

    Args:
        row: index of the prompt.
        text: never empty.
    """

    row: int
    text: str


class TextRun:
    """A generation under way: iterate over it for the text as it comes, then read :attr:`results`.

    Args:
        runner: computes the logits.
        tokenizer: turns new tokens into text.
        prompts: token ids of each row.
        options: everything else; ``stop_ids`` do not become text.
        prefix: as for :class:`~peft_deploy.runtime.generation.GenerationRun`.
        read: tokens of each text that was read before, where rows do not begin with their prompts.
    """

    def __init__(
        self,
        runner: Runner | CachingRunner,
        tokenizer: Tokenizer,
        prompts: Sequence[Sequence[int]],
        options: GenerationOptions,
        prefix: Prefix | Mapping[str, Array] | None = None,
        read: Sequence[int] | None = None,
    ) -> None:
        self._read_tokens = read
        self._run = GenerationRun(runner, prompts, options, prefix)
        self._streams = [tokenizer.stream() for _ in prompts]
        self._tokenizer = tokenizer
        self._pieces = self._read()

    def __iter__(self) -> Iterator[TextPiece]:
        """The pieces as they come."""
        return self._pieces

    @property
    def results(self) -> list[Generation]:
        """One result a prompt; runs whatever has not been iterated over."""
        for _ in self._pieces:
            pass
        results = [replace(result, text=self._whole(result)) for result in self._run.results]
        if self._read_tokens is None:
            return results
        return [
            replace(result, prompt_tokens=count)
            for result, count in zip(results, self._read_tokens, strict=True)
        ]

    def _whole(self, result: Generation) -> str:
        ended = result.finish_reason == "stop"
        return self._tokenizer.decode(result.token_ids[:-1] if ended else result.token_ids)

    def _read(self) -> Iterator[TextPiece]:
        for event in self._run:
            text = self._text(event)
            if text:
                yield TextPiece(event.row, text)

    def _text(self, event: NewToken) -> str:
        stream = self._streams[event.row]
        text = "" if event.finish_reason == "stop" else stream.push(event.token)
        return text if event.finish_reason is None else text + stream.finish()


def encode_prompts(
    tokenizer: Tokenizer, prompts: Sequence[str], *, chat: bool = False, system: str | None = None
) -> list[list[int]]:
    """Token ids of each prompt.

    Args:
        tokenizer: the model's.
        prompts: texts to continue, or with ``chat`` what the user says.
        chat: put the prompts into the model's chat template.
        system: the system's message before the user's.

    Raises:
        ConfigError: ``chat`` for a model without a chat template.
    """
    if not chat:
        return [tokenizer.encode(prompt) for prompt in prompts]
    before = [] if system is None else [{"role": "system", "content": system}]
    return [tokenizer.chat_ids([*before, {"role": "user", "content": p}]) for p in prompts]
