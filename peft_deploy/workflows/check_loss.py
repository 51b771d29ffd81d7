"""Measures what a bundle of lower precision has lost against the model in float32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peft_deploy.bundle import Manifest
from peft_deploy.families import EncoderDecoderFamily
from peft_deploy.parity.cases import Text
from peft_deploy.parity.loss import measure_loss
from peft_deploy.parity.passages import PROSE
from peft_deploy.parity.play import Results, read_text
from peft_deploy.parity.report import ParityReport
from peft_deploy.runtime import open_runner
from peft_deploy.text import Tokenizer
from peft_deploy.text.tokenizer import TOKENIZER
from peft_deploy.workflows.sources import ExportSource

if TYPE_CHECKING:
    from paddle import nn

MAX_TOKENS = 256


@dataclass(frozen=True, eq=False)
class KnownText:
    """A text and what the model in float32 makes of it.

    Args:
        text: the text.
        results: of the model, its adapter active.
        real_text: whether the text is real; random tokens stand in its place without a tokenizer.
    """

    text: Text
    results: Results
    real_text: bool


def read_in_float32(model: nn.Layer, folder: Path, source: ExportSource) -> KnownText:
    """What the model makes of the text, before its weights are rounded.

    Args:
        model: in the dynamic graph, its adapter active; left as it was.
        folder: the bundle, for its tokenizer.
        source: what it was made of.
    """
    from peft_deploy.parity.reference import PaddleReference

    has_tokenizer = (folder / TOKENIZER).is_file()
    tokenizer = Tokenizer.from_folder(folder) if has_tokenizer else None
    text = _text(source, tokenizer, Manifest.read(folder))
    reference = PaddleReference(model, source.family, source.config)
    return KnownText(text, read_text(reference, text), tokenizer is not None)


def add_loss(
    report: ParityReport, known: KnownText, folder: Path, *, provider: str = "cpu"
) -> ParityReport:
    """The report with what the bundle has lost.

    Args:
        report: of the other checks.
        known: from :func:`read_in_float32`.
        folder: the bundle, sealed or not.
        provider: what runs it.
    """
    precision = Manifest.read(folder).precision
    runner = open_runner(folder, provider=provider)
    loss = measure_loss(
        runner, known.results, known.text, precision=precision, real_text=known.real_text
    )
    return replace(report, loss=loss)


def _text(source: ExportSource, tokenizer: Tokenizer | None, manifest: Manifest) -> Text:
    family, config = source.family, source.config
    dims = family.dims(config)
    length = min(MAX_TOKENS, dims.max_positions)
    if tokenizer is not None:
        ids = np.asarray(tokenizer.encode(PROSE)[:length], np.int64)
    else:
        ids = _random(config, dims.vocab_size, length)
    if not isinstance(family, EncoderDecoderFamily):
        return Text("prose", ids)
    assert manifest.encoder is not None  # such a family has one
    start = np.array([manifest.encoder.start_token_id], np.int64)
    return Text("prose", np.concatenate([start, ids])[:length], source=ids)


def _random(config: Mapping[str, Any], vocab_size: int, length: int) -> np.ndarray[Any, Any]:
    """Tokens other than padding, which encoders count by."""
    ids = np.random.default_rng(0).integers(0, vocab_size - 1, length, dtype=np.int64)
    return ids + (ids >= (config.get("pad_token_id") or 0))
