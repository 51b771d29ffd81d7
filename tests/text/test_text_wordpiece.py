from __future__ import annotations

import json
from pathlib import Path

import pytest

from peft_deploy.errors import CheckpointError
from peft_deploy.text import Tokenizer
from peft_deploy.text.wordpiece import wordpiece_json

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "lamp",
    "burn",
    "##ed",
    "##ing",
    "all",
    "night",
    ".",
    ",",
    "'",
    "naive",
    "facade",
    "天",
    "气",
    "2",
    "5",
    "The",
]
TEXTS = (
    "The lamp burned all night.",
    "the LAMP burning, unknown",
    "naïve façade",
    "天气 burned 2.5",
    "the [MASK] burned\tall\n night",
    "burned'burned",
    "",
    "b" * 200,
)


def write(folder: Path, words: list[str] = WORDS, **config: object) -> Tokenizer:
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    made = wordpiece_json(folder)
    assert made is not None
    (folder / "tokenizer.json").write_text(made, "utf-8")
    return Tokenizer.from_folder(folder)


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.filterwarnings("ignore:pkg_resources", "ignore:Setuptools is replacing")
def test_it_tokenizes_as_paddlenlp_does(tmp_path: Path, lowercase: bool) -> None:
    pytest.importorskip("paddle")
    from peft_deploy.environment import require_paddle

    require_paddle("this test")
    from paddlenlp.transformers import BertTokenizer

    ours = write(tmp_path, do_lower_case=lowercase)
    theirs = BertTokenizer(str(tmp_path / "vocab.txt"), do_lower_case=lowercase)
    for text in TEXTS:
        assert ours.encode(text) == list(theirs(text)["input_ids"]), text
    pair, expected = ours.encode_text(TEXTS[:2]), theirs(*TEXTS[:2])  # type: ignore[arg-type]
    assert pair.ids == list(expected["input_ids"])
    assert pair.type_ids == list(expected["token_type_ids"])
    assert ours.pad_id == 0


def test_texts_come_back(tmp_path: Path) -> None:
    tokenizer = write(tmp_path, pad_token="[PAD]")
    assert (
        tokenizer.decode(tokenizer.encode("the lamp burned all night."))
        == "the lamp burned all night."
    )


def test_texts_are_cut_when_asked(tmp_path: Path) -> None:
    tokenizer = write(tmp_path)
    whole = tokenizer.encode_text("the lamp burned all night")
    cut = tokenizer.encode_text("the lamp burned all night", 5)
    assert len(whole.ids) == 8 and cut.ids == [*whole.ids[:4], whole.ids[-1]]
    pair = tokenizer.encode_text(("the lamp burned all night", "lamp"), 7)
    assert pair.type_ids == [0, 0, 0, 0, 0, 1, 1]
    assert tokenizer.encode("the lamp burned all night") == whole.ids  # nothing is cut afterwards


def test_other_vocabularies_are_left_alone(tmp_path: Path) -> None:
    assert wordpiece_json(tmp_path) is None
    (tmp_path / "vocab.txt").write_text("<s>\n</s>\n<unk>\nthe\n")
    assert wordpiece_json(tmp_path) is None


def test_a_token_that_stands_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'lamp' twice"):
        write(tmp_path, [*WORDS, "lamp"])
