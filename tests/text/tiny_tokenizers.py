"""Small tokenizers of the two kinds that models come with, trained on the spot."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

SPECIAL = ["<s>", "</s>", "<pad>", "<|end|>"]
BOS, EOS, PAD, END = range(4)
CORPUS = ["the cat sat on the mat", "a naïve façade, über alles", "one two three"] * 3


def byte_level() -> Tokenizer:
    """GPT-like: every byte is a token, nothing is added around a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """Llama-like: spaces are part of words, unknown characters fall back to bytes, <s> is
    added.
    """
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    pieces = [*SPECIAL, *bytes_, "▁", *"acehmnostw", "▁t", "▁th", "▁the", "▁c", "at", "▁cat"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "c"), ("a", "t"), ("▁c", "at")]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    model = models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<0x00>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


def write(folder: Path, tokenizer: Tokenizer, **files: object) -> Path:
    """Writes tokenizer.json and, as JSON, each of ``files`` under its name."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, data in files.items():
        (folder / f"{name}.json").write_text(json.dumps(data), "utf-8")
    return folder
