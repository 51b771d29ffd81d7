"""Which tokens begin, end and pad a text, from the files that lie beside ``tokenizer.json``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_deploy.errors import CheckpointError

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
GENERATION_CONFIG = "generation_config.json"
MODEL_CONFIG = "config.json"

_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of a model.

    Args:
        texts: ``bos_token``, ``eos_token``, … → the token's text, as chat templates use them.
        bos_id: begin of text, None when the model has none.
        eos_ids: tokens that end a text. The tokenizer's own comes first (training appends that
            one), then those that ``generation_config.json``, or in its absence ``config.json``,
            adds.
        pad_id: fills up batches: the tokenizer's, else the configuration's, else the first end
            token, else 0.
    """

    texts: Mapping[str, str]
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int
    tokenizer_config: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_folder(
        cls, folder: Path, token_to_id: Callable[[str], int | None], vocab_size: int
    ) -> SpecialTokens:
        """Reads the special tokens of a model or bundle folder.

        Args:
            folder: holds the configuration files; each of them may be missing.
            token_to_id: the vocabulary.
            vocab_size: ids at or above it are not tokens.

        Raises:
            CheckpointError: a file cannot be read, or names a token that is not in the vocabulary.
        """
        tokenizer_config = read_json(folder / TOKENIZER_CONFIG)
        texts = _texts(tokenizer_config, read_json(folder / SPECIAL_TOKENS_MAP))
        generation = read_json(folder / GENERATION_CONFIG)
        model = read_json(folder / MODEL_CONFIG)

        def named(key: str) -> int | None:
            text = texts.get(key)
            found = None if text is None else token_to_id(text)
            if text is not None and found is None and key in ("bos_token", "eos_token"):
                raise CheckpointError(
                    f"{folder} calls {text!r} its {key}, and tokenizer.json has no such token"
                )
            return found

        def configured(key: str) -> list[int]:
            value = generation.get(key, model.get(key))
            return _ids(value, f"{key} of {folder}", vocab_size)

        own = named("eos_token")
        eos = dict.fromkeys([*([] if own is None else [own]), *configured("eos_token_id")])
        bos = named("bos_token")
        if bos is None and "bos_token" not in tokenizer_config:
            bos = next(iter(configured("bos_token_id")), None)
        pad = named("pad_token")
        if pad is None:
            pad = next(iter([*configured("pad_token_id"), *eos]), 0)
        return cls(texts, bos, tuple(eos), pad, tokenizer_config)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file.

    Raises:
        CheckpointError: the file is not JSON, or not an object.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{path} cannot be read: {exc}") from exc
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, and should hold an object")
    return data


def _texts(config: Mapping[str, Any], special_map: Mapping[str, Any]) -> dict[str, str]:
    texts = {}
    for key in _NAMED:
        value = config.get(key, special_map.get(key))
        if isinstance(value, Mapping):  # a serialized AddedToken
            value = value.get("content")
        if isinstance(value, str):
            texts[key] = value
    return texts


def _ids(value: Any, what: str, vocab_size: int) -> list[int]:
    values = value if isinstance(value, list) else [value]
    ids = []
    for entry in values:
        if entry is None:
            continue
        if isinstance(entry, bool) or not isinstance(entry, int):
            raise CheckpointError(
                f"{what} is {value!r}; it should be a token id or a list of them"
            )
        if 0 <= entry < vocab_size:  # some configurations write -1 for "none"
            ids.append(entry)
    return ids
