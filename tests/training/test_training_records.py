from __future__ import annotations

import json
from pathlib import Path

import pytest

from peft_deploy.errors import ConfigError
from peft_deploy.training import Chat, Completion, Text, read_records

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ahoy"}]


def written(folder: Path, *lines: object) -> Path:
    path = folder / "data.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", "utf-8")
    return path


def test_all_three_forms_keep_their_line_numbers(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {"prompt": "1+1=", "completion": "2"},
        "",
        {"text": "A whole text", "source": "a remark that is ignored"},
        {"messages": CHAT},
        {"prompt": "", "completion": "from nothing"},
    )
    assert read_records(path) == [
        Completion(1, "1+1=", "2"),
        Text(3, "A whole text"),
        Chat(4, tuple(CHAT)),
        Completion(5, "", "from nothing"),
    ]


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    assert read_records(path) == [Text(1, "a"), Text(2, "b")]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{'text': 1}", "not JSON"),
        ("[1]", "a JSON list"),
        ({"completions": "x"}, "did you mean 'completion'"),
        ({}, "has no keys"),
        ({"prompt": "x"}, "has no 'completion'"),
        ({"completion": "x"}, "has no 'prompt'"),
        ({"prompt": "x", "completion": ""}, "'completion' is empty"),
        ({"prompt": "x", "completion": 3}, "'completion' is a int"),
        ({"text": ""}, "'text' is empty"),
        ({"text": "x", "messages": CHAT}, "mixes the forms of text and messages"),
        ({"messages": []}, "at least one message"),
        ({"messages": ["x"]}, "message 1 is a str"),
        ({"messages": [{"role": "user"}]}, "message 1 has no text under 'content'"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "the role 'bot'"),
        ({"messages": CHAT[:1]}, "the assistant says nothing"),
        ({"messages": CHAT[1:]}, "nothing to answer"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, said: str) -> None:
    path = written(tmp_path, {"text": "fine"}, line)
    with pytest.raises(ConfigError) as caught:
        read_records(path)
    assert f"{path}, line 2: " in caught.value.message
    assert said in caught.value.message
    assert caught.value.hint is not None and "completion" in caught.value.hint


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(ConfigError, match="line 2: byte 11 is not UTF-8"):
        read_records(path)


def test_a_file_without_examples_and_no_file_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no example"):
        read_records(written(tmp_path, "", " "))
    with pytest.raises(ConfigError, match="No such file"):
        read_records(tmp_path / "nowhere.jsonl")
