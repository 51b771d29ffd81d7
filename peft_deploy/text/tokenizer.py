"""Text to token ids and back, from ``tokenizer.json`` and the files beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peft_deploy.errors import CheckpointError, ConfigError
from peft_deploy.text.chat import ChatTemplate, Message
from peft_deploy.text.padding import PaddedBatch, Side, pad_batch
from peft_deploy.text.special_tokens import SpecialTokens
from peft_deploy.text.stream import TextStream

if TYPE_CHECKING:
    import tokenizers  # type: ignore[import-untyped,unused-ignore]

TOKENIZER = "tokenizer.json"
SENTENCEPIECE_FILES = ("tokenizer.model", "sentencepiece.bpe.model", "spiece.model")


@dataclass(frozen=True)
class EncodedText:
    """A text, or a pair of texts, as an encoder reads it.

    Args:
        ids: the tokens, [N].
        type_ids: which of the two texts each one is of, [N].
    """

    ids: list[int]
    type_ids: list[int]


class Tokenizer:
    """The tokenizer of a model or a bundle.

    Args:
        engine: the vocabulary and its rules; its own padding and truncation are switched off.
        special: the special tokens.
        chat_template: the chat template, None when the model has none.
    """

    def __init__(
        self,
        engine: tokenizers.Tokenizer,
        special: SpecialTokens,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        # A tokenizer.json may carry the settings of its last use, and would cut prompts without a
        # word.
        engine.no_padding()
        engine.no_truncation()
        self._engine = engine
        self.special = special
        self.chat_template = chat_template
        self._ends = _overridden_ends(engine, special)

    @classmethod
    def from_folder(cls, path: Path | str) -> Tokenizer:
        """The tokenizer of a model or bundle folder.

        Raises:
            CheckpointError: there is no ``tokenizer.json``, or one of the files is damaged.
        """
        folder = Path(path)
        engine = _read_engine(folder)
        special = SpecialTokens.from_folder(
            folder, engine.token_to_id, engine.get_vocab_size(with_added_tokens=True)
        )
        template = ChatTemplate.from_folder(folder, special.tokenizer_config, special.texts)
        return cls(engine, special, template)

    @property
    def bos_id(self) -> int | None:
        """Id of the begin-of-text token, None when the model has none."""
        return self.special.bos_id

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a text, the tokenizer's own first; empty when the model has none."""
        return self.special.eos_ids

    @property
    def pad_id(self) -> int:
        """Id that fills up batches."""
        return self.special.pad_id

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's logits may be wider."""
        return int(self._engine.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of a text.

        Args:
            text: may contain special tokens in their written form; they become their ids.
            special: add what the model expects around a text (a begin-of-text token, say). A text
                that a chat template made already has all of it, so pass False for that.
        """
        if not special or self._ends is None:
            return list(self._engine.encode(text, add_special_tokens=special).ids)
        head, tail = self._ends
        return [*head, *self._engine.encode(text, add_special_tokens=False).ids, *tail]

    def encode_text(
        self, text: str | tuple[str, str], max_tokens: int | None = None
    ) -> EncodedText:
        """A text or a pair of texts with everything that the model expects around and between them.

        Args:
            text: one text, or two that are read together.
            max_tokens: cut the text at its end, the longer one of a pair first; None to cut nothing.

        Raises:
            ConfigError: there is no room for a text beside the special tokens.
        """
        first, second = (text, None) if isinstance(text, str) else text
        if self._ends is not None:  # tokenizer_config.json overrules what stands around a text
            if second is not None:
                raise ConfigError("this model's tokenizer does not read pairs of texts")
            ids = self.encode(first)
            return EncodedText(ids[:max_tokens], [0] * len(ids[:max_tokens]))
        pair = () if second is None else (second,)
        encoded = self._engine.encode(first, *pair)
        if max_tokens is not None and len(encoded.ids) > max_tokens:
            room = max_tokens - self._engine.num_special_tokens_to_add(second is not None)
            if room < 1:
                raise ConfigError(f"there is no room for a text in {max_tokens} tokens")
            self._engine.enable_truncation(max_tokens, strategy="longest_first")
            try:
                encoded = self._engine.encode(first, *pair)
            finally:
                self._engine.no_truncation()
        return EncodedText(list(encoded.ids), list(encoded.type_ids))

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of the ids, without special tokens unless they are asked for.

        Raises:
            ConfigError: a negative id.
        """
        if any(i < 0 for i in ids):
            raise ConfigError(f"token id {min(ids)} is negative")
        return str(self._engine.decode(list(ids), skip_special_tokens=skip_special))

    def stream(self) -> TextStream:
        """A new stream that turns tokens into text as they come."""
        return TextStream(self.decode)

    def chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The messages as the one text that the model was trained on.

        Raises:
            ConfigError: the model has no chat template, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise ConfigError(
                "this model has no chat template (neither chat_template.jinja nor an entry in "
                "tokenizer_config.json)",
                hint="give the prompt as plain text",
            )
        return self.chat_template.render(messages, add_generation_prompt=add_generation_prompt)

    def chat_ids(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """The ids of :meth:`chat`, no special token added twice."""
        text = self.chat(messages, add_generation_prompt=add_generation_prompt)
        return self.encode(text, special=False)

    def pad(self, rows: Sequence[Sequence[int]], side: Side = "left") -> PaddedBatch:
        """The rows as one batch, filled up with this tokenizer's pad id."""
        return pad_batch(rows, self.pad_id, side)


def _read_engine(folder: Path) -> tokenizers.Tokenizer:
    import tokenizers  # type: ignore[import-untyped,unused-ignore]

    path = folder / TOKENIZER
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    if not path.is_file():
        found = [name for name in SENTENCEPIECE_FILES if (folder / name).is_file()]
        only = f"; {found[0]}, a SentencePiece model, cannot be read" if found else ""
        raise CheckpointError(
            f"{folder} has no {TOKENIZER}{only}",
            hint=f"add the {TOKENIZER} of the model: Hugging Face's AutoTokenizer writes one with "
            "from_pretrained(…, use_fast=True).save_pretrained(…)",
        )
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as exc:  # the package raises Exception itself, nothing narrower
        raise CheckpointError(f"{path} cannot be read: {exc}") from exc


def _overridden_ends(
    engine: tokenizers.Tokenizer, special: SpecialTokens
) -> tuple[list[int], list[int]] | None:
    """Ids around every text, where tokenizer_config.json overrules tokenizer.json; None where it
    does not.

    ``add_bos_token`` and ``add_eos_token`` go before the post-processor of ``tokenizer.json``, as
    in Hugging Face's tokenizers.
    """
    encoded = engine.encode("a", add_special_tokens=True)
    added = encoded.special_tokens_mask
    first = added.index(0) if 0 in added else len(added)
    last = len(added) - added[::-1].index(0) if 0 in added else len(added)
    head, tail = list(encoded.ids[:first]), list(encoded.ids[last:])
    before = (list(head), list(tail))
    wanted = special.tokenizer_config
    bos, eos = special.bos_id, special.eos_ids[0] if special.eos_ids else None
    if (add := wanted.get("add_bos_token")) is not None and bos is not None:
        head = head[1:] if head[:1] == [bos] else head
        head = [bos, *head] if add else head
    if (add := wanted.get("add_eos_token")) is not None and eos is not None:
        tail = tail[:-1] if tail[-1:] == [eos] else tail
        tail = [*tail, eos] if add else tail
    return (head, tail) if (head, tail) != before else None
