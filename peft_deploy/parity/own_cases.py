"""A user's own prompts as further cases of a check."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from peft_deploy.errors import ConfigError, nearest
from peft_deploy.parity.cases import DECODE_STEPS, Case, CaseMatrix, Text, continued, padded, whole
from peft_deploy.parity.generation import Prompt

GROUP = "your prompts"
MAX_PROMPTS = 64  # every one costs both sides several forward passes
MAX_TOKENS = 64  # of a prompt that count in the matrix; greedy text goes on from all of them
_BATCH = 3
_SIDES = "lrb"
_KEYS = ("prompt", "ids", "name")

Encode = Callable[[str], Sequence[int]]


def read_own_prompts(path: Path, encode: Encode | None) -> list[Prompt]:
    """The prompts in a file.

    A ``.jsonl`` file holds an object a line: ``{"prompt": "text"}``, or ``{"ids": [1, 2]}`` for a
    bundle without a tokenizer, either with a ``"name"`` for the report. In any other file every
    line that is not blank is a prompt.

    Args:
        path: the file.
        encode: gives a text's tokens; None without a tokenizer.

    Raises:
        ConfigError: the file cannot be read, holds no prompt or too many, or a line is not what it
            should be; the message names the line.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"the cases {path} cannot be read: {exc}") from exc
    parse = _object if path.suffix == ".jsonl" else _line
    prompts = [
        parse(line, f"{path}, line {number}", encode)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not 0 < len(prompts) <= MAX_PROMPTS:
        raise ConfigError(
            f"{path} holds {len(prompts)} prompts; it can be 1 to {MAX_PROMPTS}",
            hint="one prompt a line, or in a .jsonl file one object a line",
        )
    return prompts


def check_own_prompts(
    prompts: Sequence[Prompt], *, vocab_size: int, max_positions: int, new_tokens: int
) -> None:
    """Passes when a model can read and continue every prompt.

    Args:
        prompts: from :func:`read_own_prompts`.
        vocab_size: of the model.
        max_positions: that a text can have.
        new_tokens: that each prompt is to be continued by.

    Raises:
        ConfigError: a token is outside the vocabulary, or a prompt is too long.
    """
    for prompt in prompts:
        wrong = [token for token in prompt.ids if not 0 <= token < vocab_size]
        if wrong:
            raise ConfigError(
                f"the case {prompt.text!r} has the token {wrong[0]}; the model's are 0 to "
                f"{vocab_size - 1}"
            )
        if len(prompt.ids) + new_tokens > max_positions:
            raise ConfigError(
                f"the case {prompt.text!r} has {len(prompt.ids)} tokens; with {new_tokens} new "
                f"ones it would need more than the model's {max_positions} positions"
            )


def with_own_texts(matrix: CaseMatrix, prompts: Sequence[Prompt]) -> CaseMatrix:
    """The matrix with every prompt alone, padded beside others, and decoded with the cache.

    Args:
        matrix: of the decoder.
        prompts: at least one.
    """
    texts = [
        Text(
            f"prompt {i}: {prompt.text}",
            np.asarray(prompt.ids[:MAX_TOKENS], np.int64),
            source=None if prompt.source is None else np.asarray(prompt.source, np.int64),
        )
        for i, prompt in enumerate(prompts, 1)
    ]
    pad_id = matrix.cases[0].pad_id
    cases = [
        *(_case(text.name, [text], whole([text])) for text in texts),
        *(_decoded(text) for text in texts if len(text) > DECODE_STEPS),
        *(_padded(texts, first) for first in range(0, len(texts), _BATCH)),
    ]
    return CaseMatrix(
        texts=(*matrix.texts, *texts),
        cases=(*matrix.cases, *(replace(case, pad_id=pad_id) for case in cases)),
    )


def _case(
    name: str, texts: Sequence[Text], slots: Any, calls: tuple[int, ...] | None = None
) -> Case:
    return Case(name, GROUP, tuple(texts), slots, calls or (slots.shape[1],))


def _decoded(text: Text) -> Case:
    prompt = len(text) - DECODE_STEPS
    slots = continued([text], [prompt], DECODE_STEPS, "l")
    return _case(f"{text.name}, decoded", [text], slots, (prompt, *(1,) * DECODE_STEPS))


def _padded(texts: Sequence[Text], first: int) -> Case:
    batch = texts[first : first + _BATCH]
    name = f"prompts {first + 1} to {first + len(batch)}, padded"
    return _case(name, batch, padded(batch, _SIDES[: len(batch)]))


def _line(line: str, where: str, encode: Encode | None) -> Prompt:
    return _encoded(line.strip(), line.strip(), where, encode)


def _object(line: str, where: str, encode: Encode | None) -> Prompt:
    try:
        data = json.loads(line)
    except ValueError as exc:
        raise ConfigError(f"{where} is not JSON: {exc}") from exc
    if not isinstance(data, dict):
        raise ConfigError(f"{where} holds a {type(data).__name__}; an object is needed")
    unknown = [key for key in data if key not in _KEYS]
    if unknown:
        close = nearest(unknown[0], _KEYS)
        raise ConfigError(
            f"{where} has the unknown key {unknown[0]!r}; it can have {', '.join(_KEYS)}",
            hint=f"did you mean {close[0]!r}?" if close else None,
        )
    text, ids = data.get("prompt"), data.get("ids")
    if (text is None) == (ids is None):
        raise ConfigError(f"{where} needs either a prompt or ids")
    name = data.get("name")
    if name is not None and not isinstance(name, str):
        raise ConfigError(f"{where}: the name is {name!r}; a text is needed")
    if ids is not None:
        if not isinstance(ids, list) or not ids or any(type(i) is not int for i in ids):
            raise ConfigError(f"{where}: ids has to be a list of whole numbers, not {ids!r:.40}")
        return Prompt(name or f"{len(ids)} tokens", tuple(ids))
    if not isinstance(text, str):
        raise ConfigError(f"{where}: the prompt is {text!r:.40}; a text is needed")
    return _encoded(text, name or text, where, encode)


def _encoded(text: str, name: str, where: str, encode: Encode | None) -> Prompt:
    if encode is None:
        raise ConfigError(
            f"{where} is a text, and the bundle has no tokenizer",
            hint='give tokens in a .jsonl file: {"ids": [1, 2, 3]}',
        )
    ids = tuple(encode(text))
    if not ids:
        raise ConfigError(f"{where}: {text!r} has no tokens")
    return Prompt(name, ids)
