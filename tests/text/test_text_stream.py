from __future__ import annotations

from pathlib import Path

import pytest
import tiny_tokenizers as tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_deploy.text import Tokenizer

TEXTS = [
    "the cat sat on the mat",
    "naïve façade, über 😀👩‍👩‍👧 日本語のテキスト",
    " leading and  double   spaces ",
    "a�b � c",  # the replacement character itself is also a text
    "",
]


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece_like"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("stream")
    engine = getattr(tiny, request.param)()
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer.from_folder(tiny.write(folder, engine, tokenizer_config=config))


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*(stream.push(token) for token in ids), stream.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_add_up_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids) == text


def test_no_piece_holds_half_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("😀 日本")
    assert len(ids) > 10  # every character is spread over several tokens
    pieces = [piece for piece in streamed(tokenizer, ids) if piece.strip()]
    assert [piece.strip() for piece in pieces] == ["😀", "日", "本"]


def test_text_comes_as_soon_as_it_is_complete(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the cat", special=False)
    pieces = streamed(tokenizer, ids)
    assert all(pieces[:-1])
    assert pieces[-1] == ""


def test_bytes_that_never_get_complete_come_at_the_end(tokenizer: Tokenizer) -> None:
    whole = tokenizer.encode("cat 😀", special=False)
    pieces = streamed(tokenizer, whole[:-1])
    assert "".join(pieces[:-1]) == "cat "
    assert set(pieces[-1]) == {"�"}
    assert "".join(pieces) == tokenizer.decode(whole[:-1])


def test_special_tokens_have_no_text_and_eat_no_space(tokenizer: Tokenizer) -> None:
    ids = [tiny.BOS, *tokenizer.encode("the", special=False), tiny.END]
    ids += tokenizer.encode("cat", special=False)
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("tokenizer", ["byte_level"], indirect=True)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_bytes_a_model_says_the_stream_says_them_too(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=24))
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_text_a_model_says_the_stream_says_it_too(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    words = tokenizer.encode("the naïve cat sat 😀", special=False)
    ids = data.draw(st.lists(st.sampled_from([*words, *range(4)]), max_size=24))
    whole = tokenizer.decode(ids)
    if "�" not in whole:  # else see the stream's docstring on byte fallback
        assert "".join(streamed(tokenizer, ids)) == whole


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=20))
def test_any_text_streams(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)
