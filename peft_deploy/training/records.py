"""The examples of a JSONL file, checked line by line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_deploy.errors import ConfigError, nearest

ROLES = ("system", "user", "assistant", "tool")
_FORMS = '{"prompt": …, "completion": …}, {"text": …} or {"messages": [{"role": …, "content": …}]}'
_KEYS = ("prompt", "completion", "text", "messages")


@dataclass(frozen=True)
class Completion:
    """A prompt and what is to follow it; only the completion is learned.

    Args:
        line: where it stands in the file.
        prompt: given to the model as it is, without a chat template.
        completion: what follows it.
    """

    line: int
    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """A text, learned from its first word to its last."""

    line: int
    text: str


@dataclass(frozen=True)
class Chat:
    """A conversation; what the assistant says in it is learned.

    Args:
        line: where it stands in the file.
        messages: ``role`` and ``content`` of each.
    """

    line: int
    messages: tuple[Mapping[str, str], ...]


Record = Completion | Text | Chat


def read_records(path: Path) -> list[Record]:
    """The examples of a file, one a line; empty lines are skipped.

    Keys beside those of the three forms are taken for remarks and ignored.

    Raises:
        ConfigError: there is no such file, it holds no example, or a line is not an example; the
            message has file and line number.
    """
    records = [_record(path, number, line) for number, line in _lines(path) if line.strip()]
    if not records:
        raise ConfigError(f"{path} holds no example", hint=f"each line has to be {_FORMS}")
    return records


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read: {exc.strerror or exc}") from exc
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        yield number, _decoded(path, number, line)


def _decoded(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise _wrong(path, number, f"byte {exc.start + 1} is not UTF-8") from None


def _wrong(path: Path, number: int, what: str) -> ConfigError:
    return ConfigError(f"{path}, line {number}: {what}", hint=f"a line has to be {_FORMS}")


def _record(path: Path, number: int, line: str) -> Record:
    try:
        data = json.loads(line)
    except ValueError as exc:
        raise _wrong(path, number, f"not JSON: {exc}") from None
    if not isinstance(data, dict):
        raise _wrong(path, number, f"a JSON {type(data).__name__}, and an object is needed")
    forms = {
        "completion": "prompt" in data or "completion" in data,
        "text": "text" in data,
        "messages": "messages" in data,
    }
    given = [form for form, present in forms.items() if present]
    if len(given) > 1:
        raise _wrong(path, number, f"mixes the forms of {' and '.join(given)}; give one of them")
    if not given:
        raise _wrong(path, number, f"has {_named(data)}{_meant(data)}")
    if given == ["messages"]:
        return Chat(number, _messages(path, number, data["messages"]))
    if given == ["text"]:
        return Text(number, _text(path, number, data, "text"))
    prompt = _text(path, number, data, "prompt", may_be_empty=True)
    return Completion(number, prompt, _text(path, number, data, "completion"))


def _named(data: Mapping[str, Any]) -> str:
    return f"only the keys {', '.join(map(repr, data))}" if data else "no keys"


def _meant(data: Mapping[str, Any]) -> str:
    for key in data:
        if close := nearest(key, _KEYS, limit=1):
            return f"; did you mean {close[0]!r} by {key!r}?"
    return ""


def _text(
    path: Path, number: int, data: Mapping[str, Any], key: str, *, may_be_empty: bool = False
) -> str:
    if key not in data:
        raise _wrong(path, number, f"has no {key!r} beside {', '.join(map(repr, data))}")
    value = data[key]
    if not isinstance(value, str):
        raise _wrong(path, number, f"{key!r} is a {type(value).__name__}, and a text is needed")
    if not value and not may_be_empty:
        raise _wrong(path, number, f"{key!r} is empty, so there is nothing to learn")
    return value


def _messages(path: Path, number: int, value: object) -> tuple[Mapping[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise _wrong(path, number, "'messages' has to be a list of at least one message")
    for index, message in enumerate(value, start=1):
        where = f"message {index}"
        if not isinstance(message, dict):
            raise _wrong(path, number, f"{where} is a {type(message).__name__}, not an object")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise _wrong(path, number, f"{where} has no text under {key!r}")
        if message["role"] not in ROLES:
            raise _wrong(
                path, number, f"{where} has the role {message['role']!r}, not {', '.join(ROLES)}"
            )
    if value[0]["role"] == "assistant":
        raise _wrong(path, number, "message 1 is the assistant's, and there is nothing to answer")
    said = [message["content"] for message in value if message["role"] == "assistant"]
    if not any(said):
        raise _wrong(path, number, "the assistant says nothing, so there is nothing to learn")
    return tuple(value)
