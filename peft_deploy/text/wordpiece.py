"""A ``tokenizer.json`` for models that come with a WordPiece vocabulary alone, as PaddleNLP's BERT and ERNIE do."""

from __future__ import annotations

from pathlib import Path

from peft_deploy.errors import CheckpointError
from peft_deploy.text.special_tokens import TOKENIZER_CONFIG, read_json

VOCABULARY = "vocab.txt"
_USUAL = {
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "mask_token": "[MASK]",
}


def wordpiece_json(folder: Path) -> str | None:
    """The contents of a ``tokenizer.json`` that does what the folder's vocabulary is for.

    That is BERT's algorithm (Devlin et al. 2019): texts cleaned, in lower case unless tokenizer_config.json says
    otherwise, Chinese characters set apart, words split at punctuation and then into the longest known pieces,
    ``[CLS] … [SEP]`` around a text and ``[CLS] … [SEP] … [SEP]`` around a pair.

    Args:
        folder: of the model.

    Returns:
        None when there is no ``vocab.txt``, or one of another kind: without BERT's special tokens.

    Raises:
        CheckpointError: a file cannot be read, or a token appears twice.
    """
    path = folder / VOCABULARY
    if not path.is_file():
        return None
    ids = _read_vocabulary(path)
    config = read_json(folder / TOKENIZER_CONFIG)
    names = {key: _text(config.get(key)) or usual for key, usual in _USUAL.items()}
    if not {names["unk_token"], names["cls_token"], names["sep_token"]} <= ids.keys():
        return None
    import tokenizers  # type: ignore[import-untyped,unused-ignore]
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    lowercase = config.get("do_lower_case", True) is not False
    chinese = config.get("tokenize_chinese_chars", True) is not False
    engine = tokenizers.Tokenizer(models.WordPiece(ids, unk_token=names["unk_token"]))
    engine.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase,
        handle_chinese_chars=chinese,
        strip_accents=config.get("strip_accents"),
    )
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.decoder = decoders.WordPiece()
    cls, sep = names["cls_token"], names["sep_token"]
    engine.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(token, ids[token]) for token in (cls, sep)],
    )
    engine.add_special_tokens([token for token in names.values() if token in ids])
    written: str = engine.to_str(pretty=True)
    return written + "\n"


def _read_vocabulary(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{path} cannot be read: {exc}") from exc
    if lines[-1] == "":
        lines.pop()
    tokens = [line.rstrip("\r") for line in lines]
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        again = next(token for i, token in enumerate(tokens) if ids[token] != i)
        raise CheckpointError(f"{path} holds the token {again!r} twice")
    return ids


def _text(value: object) -> str | None:
    if isinstance(value, dict):  # a serialized AddedToken
        value = value.get("content")
    return value if isinstance(value, str) else None
