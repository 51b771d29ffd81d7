"""Examples as token ids, each with the word whether the model learns to say it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peft_deploy.errors import ConfigError
from peft_deploy.text import Tokenizer
from peft_deploy.training.records import Chat, Record, Text

_SHOWN_LINES = 10


@dataclass(frozen=True)
class Example:
    """One example.

    Args:
        ids: its tokens.
        learned: for each of them, whether it counts in the loss.
    """

    ids: tuple[int, ...]
    learned: tuple[bool, ...]


@dataclass(frozen=True)
class Encoded:
    """The examples of a file, and what was lost on the way.

    Args:
        examples: those with something to learn.
        truncated: lines whose example was cut to the greatest length.
        dropped: lines of whose example nothing to learn was left by that.
    """

    examples: tuple[Example, ...]
    truncated: tuple[int, ...] = field(default=())
    dropped: tuple[int, ...] = field(default=())

    def remarks(self, path: Path, max_length: int) -> list[str]:
        """A line about the examples that were cut, and one about those that were left out."""
        remarks = []
        if self.truncated:
            remarks.append(
                f"{path}: {len(self.truncated)} examples are longer than {max_length} tokens and "
                f"were cut ({_lines(self.truncated)})"
            )
        if self.dropped:
            remarks.append(
                f"{path}: {len(self.dropped)} examples were left out, because nothing to learn is "
                f"left in their first {max_length} tokens ({_lines(self.dropped)})"
            )
        return remarks


def encode_records(
    records: Sequence[Record], tokenizer: Tokenizer, max_length: int, path: Path
) -> Encoded:
    """The records as token ids.

    A completion and a text end with the model's end-of-text token, so that the model learns to
    stop. Of a conversation each turn of the assistant is learned, up to and including the token
    that ends it.

    Args:
        records: the examples.
        tokenizer: the base model's.
        max_length: an example's greatest number of tokens; the rest is cut.
        path: the file that they came from, for messages.

    Raises:
        ConfigError: a conversation and no chat template, a template that cannot be followed, or
            nothing to learn in any example.
    """
    examples, truncated, dropped = [], [], []
    for record in records:
        ids, learned = _encode(record, tokenizer, path)
        if len(ids) > max_length:
            truncated.append(record.line)
        example = Example(tuple(ids[:max_length]), tuple(learned[:max_length]))
        # A first token has nothing before it that could predict it.
        if any(example.learned[1:]):
            examples.append(example)
        else:
            dropped.append(record.line)
    if not examples:
        raise ConfigError(
            f"{path}: no example has anything to learn in its first {max_length} tokens "
            f"({_lines(dropped)})",
            hint="allow longer examples with --max-length, or shorten the prompts",
        )
    return Encoded(tuple(examples), tuple(truncated), tuple(dropped))


def _encode(record: Record, tokenizer: Tokenizer, path: Path) -> tuple[list[int], list[bool]]:
    if isinstance(record, Chat):
        return _encode_chat(record, tokenizer, path)
    end = list(tokenizer.eos_ids[:1])
    if isinstance(record, Text):
        ids = _without_end(tokenizer.encode(record.text), end) + end
        return ids, [True] * len(ids)
    prompt = _without_end(tokenizer.encode(record.prompt), end)
    completion = tokenizer.encode(record.completion, special=False) + end
    return prompt + completion, [False] * len(prompt) + [True] * len(completion)


def _without_end(ids: list[int], end: list[int]) -> list[int]:
    """What some tokenizers append to every text belongs behind the whole example only."""
    return ids[:-1] if end and ids[-1:] == end else ids


def _encode_chat(record: Chat, tokenizer: Tokenizer, path: Path) -> tuple[list[int], list[bool]]:
    """Tokenized piece by piece, the way the model meets it: a prompt first, then its own words."""
    ids: list[int] = []
    learned: list[bool] = []
    text = ""
    for index, message in enumerate(record.messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.chat(record.messages[:index])
        after = tokenizer.chat(record.messages[: index + 1], add_generation_prompt=False)
        if not before.startswith(text) or not after.startswith(before):
            raise ConfigError(
                f"{path}, line {record.line}: the chat template changes what stands before the "
                f"assistant's words in message {index + 1}, so they cannot be told apart",
                hint='give the conversation as {"prompt": …, "completion": …} instead',
            )
        given = tokenizer.encode(before[len(text) :], special=False)
        said = tokenizer.encode(after[len(before) :], special=False)
        ids += given + said
        learned += [False] * len(given) + _up_to_end(said, tokenizer.eos_ids)
        text = after
    return ids, learned


def _up_to_end(said: list[int], ends: Sequence[int]) -> list[bool]:
    """Everything through the last token that ends a text; everything where there is none."""
    last = max((i for i, token in enumerate(said) if token in ends), default=len(said) - 1)
    return [i <= last for i in range(len(said))]


def _lines(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:_SHOWN_LINES]))
    more = len(numbers) - _SHOWN_LINES
    return f"line {shown}" + (f" and {more} more" if more > 0 else "")
