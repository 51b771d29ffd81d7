"""Encoders at work: texts in padded batches, and what the graph says of each of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from peft_deploy.errors import ConfigError, ExecutionError
from peft_deploy.runtime.runner import Array, Runner
from peft_deploy.signature import (
    ATTENTION_MASK,
    BATCH,
    INPUT_IDS,
    LOGITS,
    SENTENCE_EMBEDDING,
    SEQUENCE,
    TOKEN_TYPE_IDS,
    GraphSignature,
)
from peft_deploy.text.padding import pad_batch
from peft_deploy.text.tokenizer import EncodedText, Tokenizer

TextInput = str | tuple[str, str]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Prediction:
    """What a classifier says of a text.

    Args:
        label: the class with the highest score; for a regression, its only name.
        score: of that class.
        scores: class → its share of 1 (softmax); for labels that do not exclude each other, its
            probability (sigmoid); for a regression, the number itself.
    """

    label: str
    score: float
    scores: Mapping[str, float]


def read_texts(
    runner: Runner,
    tokenizer: Tokenizer,
    texts: Sequence[TextInput],
    *,
    outputs: Sequence[str] | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    truncate: bool = False,
) -> list[dict[str, Array]]:
    """What an encoder says of each text: the outputs of its own tokens, no batch axis, no padding.

    Args:
        runner: of the encoder.
        tokenizer: the model's.
        texts: texts, or pairs of texts for models that compare two.
        outputs: names of the outputs; all when None.
        limit: the most tokens that the model can see; None when that is not known.
        batch_size: texts in one batch.
        truncate: cut texts that are too long, rather than refuse them.

    Raises:
        ConfigError: no text, a batch size below 1, or a text that is too long.
        ExecutionError: the model is no encoder, or the graph does not run.
    """
    if runner.signature.past:
        raise ExecutionError(
            "the model is a decoder, which continues texts", hint="use generate for it"
        )
    if batch_size < 1:
        raise ConfigError(f"a batch of {batch_size} texts cannot be made; at least 1 is needed")
    if not texts:
        raise ConfigError("there is no text")
    encoded = [_encode(tokenizer, text, i, limit, truncate) for i, text in enumerate(texts)]
    results: list[dict[str, Array]] = []
    for start in range(0, len(encoded), batch_size):
        batch = encoded[start : start + batch_size]
        results += _run(runner, batch, tokenizer.pad_id, outputs)
    return results


def embeddings(results: Sequence[Mapping[str, Array]]) -> Floats:
    """The sentence embeddings among what :func:`read_texts` returned, [N, E]."""
    return np.stack([result[SENTENCE_EMBEDDING] for result in results]).astype(np.float32)


def predictions(
    results: Sequence[Mapping[str, Array]], config: Mapping[str, Any]
) -> list[Prediction]:
    """What a classifier's logits mean.

    Args:
        results: from :func:`read_texts`.
        config: the bundle's config.json, which names the classes.
    """
    names = {int(i): str(name) for i, name in (config.get("id2label") or {}).items()}
    several = config.get("problem_type") == "multi_label_classification"
    found = []
    for result in results:
        logits = result[LOGITS].astype(np.float64)  # [C]
        if len(logits) == 1:
            scores = logits
        elif several:
            scores = 0.5 * (
                1 + np.tanh(logits / 2)
            )  # the sigmoid, which overflows nowhere in this form
        else:
            scores = np.exp(logits - logits.max())
            scores /= scores.sum()
        by_name = {names.get(i, f"LABEL_{i}"): float(score) for i, score in enumerate(scores)}
        label = max(by_name, key=lambda name: by_name[name])
        found.append(Prediction(label, by_name[label], by_name))
    return found


def require_output(signature: GraphSignature, name: str, *, rank: int, wanted: str) -> None:
    """Passes when the graph has an output with so many dimensions.

    Raises:
        ExecutionError: it does not; the message says what it has.
    """
    spec = next((s for s in signature.outputs if s.name == name), None)
    if spec is None or len(spec.dims) != rank or spec.dims[0] != BATCH:
        there = ", ".join(f"{s.name} {list(s.dims)}" for s in signature.outputs[:3])
        raise ExecutionError(f"the bundle does not give {wanted}; its outputs are {there}")


def _encode(
    tokenizer: Tokenizer, text: TextInput, index: int, limit: int | None, truncate: bool
) -> EncodedText:
    encoded = tokenizer.encode_text(text, limit if truncate else None)
    if limit is not None and len(encoded.ids) > limit:
        raise ConfigError(
            f"text {index} has {len(encoded.ids)} tokens; the model can see {limit}",
            hint="shorten it, or let it be cut: truncate=True",
        )
    if not encoded.ids:
        raise ConfigError(f"text {index} has no tokens")
    return encoded


def _run(
    runner: Runner, batch: Sequence[EncodedText], pad_id: int, outputs: Sequence[str] | None
) -> Iterator[dict[str, Array]]:
    padded = pad_batch([text.ids for text in batch], pad_id, "right")
    types = pad_batch([text.type_ids for text in batch], 0, "right").input_ids
    feeds: dict[str, Array] = {
        INPUT_IDS: padded.input_ids,
        ATTENTION_MASK: padded.attention_mask,
        TOKEN_TYPE_IDS: types,
    }
    signature = runner.signature
    arrays = runner.run({name: feeds[name] for name in signature.input_names}, outputs)
    sequences = {spec.name for spec in signature.outputs if SEQUENCE in spec.dims}
    for row, text in enumerate(batch):
        length = len(text.ids)
        yield {
            name: array[row, :length] if name in sequences else array[row]
            for name, array in arrays.items()
        }
