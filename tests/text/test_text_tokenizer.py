from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_tokenizers as tiny
from hypothesis import given
from hypothesis import strategies as st

from peft_deploy.errors import CheckpointError, ConfigError
from peft_deploy.text import Tokenizer, pad_batch

CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def test_text_goes_to_ids_and_back(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(tiny.write(tmp_path, tiny.byte_level()))
    ids = tokenizer.encode("the cat, über 😀")
    assert tokenizer.decode(ids) == "the cat, über 😀"
    assert max(ids) < tokenizer.vocab_size


def test_what_the_post_processor_adds_can_be_left_out(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(
        tiny.write(tmp_path, tiny.sentencepiece_like(), tokenizer_config=CONFIG)
    )
    plain = tokenizer.encode("the cat", special=False)
    assert tokenizer.encode("the cat") == [tiny.BOS, *plain]
    assert tokenizer.decode([tiny.BOS, *plain, tiny.EOS]) == "the cat"
    assert tokenizer.decode([*plain, tiny.EOS], skip_special=False) == "the cat</s>"


def test_padding_and_truncation_of_the_last_use_are_forgotten(tmp_path: Path) -> None:
    engine = tiny.byte_level()
    length = len(engine.encode("the cat sat on the mat").ids)
    engine.enable_truncation(3)
    engine.enable_padding(length=50)
    tokenizer = Tokenizer.from_folder(tiny.write(tmp_path, engine))
    assert len(tokenizer.encode("the cat sat on the mat")) == length > 3


@pytest.mark.parametrize(
    ("engine", "flags", "head", "tail"),
    [
        (tiny.byte_level, {}, [], []),
        (tiny.byte_level, {"add_bos_token": True}, [tiny.BOS], []),
        (tiny.byte_level, {"add_bos_token": True, "add_eos_token": True}, [tiny.BOS], [tiny.EOS]),
        (tiny.byte_level, {"add_bos_token": False, "add_eos_token": False}, [], []),
        (tiny.sentencepiece_like, {"add_bos_token": True}, [tiny.BOS], []),
        (tiny.sentencepiece_like, {"add_bos_token": None}, [tiny.BOS], []),
        (tiny.sentencepiece_like, {"add_bos_token": False}, [], []),
        (tiny.sentencepiece_like, {"add_eos_token": True}, [tiny.BOS], [tiny.EOS]),
    ],
)
def test_the_configuration_overrules_what_is_added_around_a_text(
    tmp_path: Path, engine, flags: dict, head: list[int], tail: list[int]
) -> None:
    config = {**CONFIG, **flags}
    tokenizer = Tokenizer.from_folder(tiny.write(tmp_path, engine(), tokenizer_config=config))
    plain = tokenizer.encode("the cat", special=False)
    assert tokenizer.encode("the cat") == [*head, *plain, *tail]
    assert len(plain) > 1


def test_special_tokens_of_the_tokenizer_configuration(tmp_path: Path) -> None:
    config = {**CONFIG, "eos_token": {"content": "</s>", "lstrip": False}}
    tokenizer = Tokenizer.from_folder(
        tiny.write(tmp_path, tiny.byte_level(), tokenizer_config=config)
    )
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (tiny.BOS, (tiny.EOS,), 2)
    assert tokenizer.special.texts == CONFIG


@pytest.mark.parametrize(
    ("files", "bos", "eos", "pad"),
    [
        ({}, None, (), 0),
        ({"special_tokens_map": CONFIG}, 0, (1,), 2),
        ({"tokenizer_config": CONFIG, "config": {"eos_token_id": 3}}, 0, (1, 3), 2),
        (
            {"tokenizer_config": CONFIG, "generation_config": {"eos_token_id": [3, 1]}},
            0,
            (1, 3),
            2,
        ),
        (
            {"generation_config": {"eos_token_id": [3]}, "config": {"eos_token_id": 1}},
            None,
            (3,),
            3,
        ),
        ({"config": {"eos_token_id": 1, "bos_token_id": 0, "pad_token_id": -1}}, 0, (1,), 1),
        ({"config": {"eos_token_id": 1, "pad_token_id": 2}}, None, (1,), 2),
        ({"config": {"eos_token_id": 10**6}}, None, (), 0),
        ({"tokenizer_config": {"bos_token": None}, "config": {"bos_token_id": 0}}, None, (), 0),
        ({"tokenizer_config": {"pad_token": "[PAD]", "eos_token": "</s>"}}, None, (1,), 1),
    ],
)
def test_where_special_ids_come_from(
    tmp_path: Path, files: dict, bos: int | None, eos: tuple[int, ...], pad: int
) -> None:
    tokenizer = Tokenizer.from_folder(tiny.write(tmp_path, tiny.byte_level(), **files))
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (bos, eos, pad)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": {"eos_token": "<eot>"}}, "'<eot>' its eos_token"),
        ({"config": {"eos_token_id": "2"}}, "eos_token_id of .* is '2'"),
        ({"config": {"eos_token_id": [1, True]}}, r"is \[1, True\]"),
        ({"generation_config": [1]}, "holds a list, and should hold an object"),
    ],
)
def test_special_tokens_that_make_no_sense(tmp_path: Path, files: dict, message: str) -> None:
    folder = tiny.write(tmp_path, tiny.byte_level(), **files)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_folder(folder)


def test_folders_without_a_usable_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        Tokenizer.from_folder(tmp_path / "missing")
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json$"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model, a SentencePiece") as caught:
        Tokenizer.from_folder(tmp_path)
    assert "AutoTokenizer" in str(caught.value.hint)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}', "utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_folder(tmp_path)
    tiny.write(tmp_path, tiny.byte_level())
    (tmp_path / "tokenizer_config.json").write_text("{", "utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json cannot be read"):
        Tokenizer.from_folder(tmp_path)


def test_negative_ids_are_no_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(tiny.write(tmp_path, tiny.byte_level()))
    with pytest.raises(ConfigError, match="token id -100 is negative"):
        tokenizer.decode([5, -100])


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_are_padded_with_the_pad_token(tmp_path: Path, side: str) -> None:
    folder = tiny.write(tmp_path, tiny.byte_level(), tokenizer_config=CONFIG)
    batch = Tokenizer.from_folder(folder).pad([[7, 8, 9], [5]], side)
    short = [2, 2, 5] if side == "left" else [5, 2, 2]
    assert batch.input_ids.tolist() == [[7, 8, 9], short]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [int(i == 5) for i in short]]
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert batch.lengths.tolist() == [3, 1]


@given(
    st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=5),
    st.sampled_from(["left", "right"]),
)
def test_a_padded_batch_holds_every_row(rows: list[list[int]], side: str) -> None:
    batch = pad_batch(rows, 0, side)
    assert batch.input_ids.shape == (len(rows), max(map(len, rows)))
    assert {a.dtype.name for a in (batch.input_ids, batch.attention_mask)} == {"int64"}
    for row, ids, mask, places in zip(
        rows, batch.input_ids, batch.attention_mask, batch.position_ids, strict=True
    ):
        assert ids[mask == 1].tolist() == row
        assert places[mask == 1].tolist() == list(range(len(row)))
        assert not ids[mask == 0].any() and not places[mask == 0].any()
        edge = np.flatnonzero(mask)[0 if side == "right" else -1]
        assert edge == (0 if side == "right" else len(mask) - 1)


def test_batches_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one row"):
        pad_batch([], 0)
    with pytest.raises(ConfigError, match="row 1 of the batch has no tokens"):
        pad_batch([[1], []], 0)
    with pytest.raises(ConfigError, match="'both' is neither"):
        pad_batch([[1]], 0, "both")  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_real_models_tokenizer(smollm2: Path) -> None:
    tokenizer = Tokenizer.from_folder(smollm2)
    assert tokenizer.encode(" Paris") == [7042]
    assert tokenizer.decode(tokenizer.encode("naïve 😀 日本語\n\ttab")) == "naïve 😀 日本語\n\ttab"
    assert tokenizer.vocab_size == 49152
    assert tokenizer.decode(tokenizer.eos_ids, skip_special=False) == "<|im_end|>"
    ids = tokenizer.chat_ids([{"role": "user", "content": "Hi"}])
    text = tokenizer.decode(ids, skip_special=False)
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert ids.count(tokenizer.bos_id) == 3  # one a turn, none added in front
