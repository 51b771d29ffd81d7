"""A small encoder in numpy, to be broken on purpose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from peft_deploy.runtime.runner import Array
from peft_deploy.signature import (
    ATTENTION_MASK,
    BATCH,
    INPUT_IDS,
    LAST_HIDDEN_STATE,
    LOGITS,
    SENTENCE_EMBEDDING,
    SEQUENCE,
    TOKEN_TYPE_IDS,
    GraphSignature,
    encoder_signature,
)

VOCAB, POSITIONS, SEGMENTS, E, CLASSES = 37, 24, 2, 8, 3
SIGNATURE = encoder_signature(
    {
        LAST_HIDDEN_STATE: (BATCH, SEQUENCE, E),
        SENTENCE_EMBEDDING: (BATCH, E),
        LOGITS: (BATCH, CLASSES),
    },
    token_types=True,
)


@dataclass(frozen=True)
class NumpyEncoder:
    """One attention layer over sums of embeddings; the mean and its scores beside the hidden states.

    Args:
        dtype: of the arithmetic.
        adapter: how strongly the adapter is applied.
        masked: whether attention and mean leave padding out.
        segments: whether segments count.
        counted: whether positions are counted from the first token, rather than from the first place.
    """

    dtype: str = "float32"
    adapter: float = 1.0
    masked: bool = True
    segments: bool = True
    counted: bool = True

    @property
    def signature(self) -> GraphSignature:
        return SIGNATURE

    def exact(self) -> NumpyEncoder:
        return replace(self, dtype="float64")

    def without_adapters(self) -> NumpyEncoder:
        return replace(self, adapter=0.0)

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        rng = np.random.default_rng(0)

        def weight(*shape: int) -> npt.NDArray[np.floating]:
            return rng.normal(0, 1, shape).astype(np.float32).astype(self.dtype)

        words, places, types = weight(VOCAB, E), weight(POSITIONS, E), weight(SEGMENTS, E)
        mix, change, head = weight(E, E), weight(E, E), weight(E, CLASSES)
        mask = feeds[ATTENTION_MASK].astype(bool)
        lead = mask.argmax(-1)[:, None] if self.counted else 0
        positions = np.maximum(np.arange(mask.shape[1])[None] - lead, 0)
        if positions.max() >= POSITIONS:
            raise AssertionError("a case reaches past the position table")
        x = words[feeds[INPUT_IDS]] + places[positions]
        x = x + types[feeds[TOKEN_TYPE_IDS]] if self.segments else x
        keep = mask if self.masked else np.ones_like(mask)
        scores = np.where(keep[:, None], x @ x.swapaxes(1, 2) / E, -1e4)  # [B, S, S]
        share = np.exp(scores - scores.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        hidden = np.tanh(share @ x @ (mix + self.adapter * change) / E)
        counts = np.maximum(keep.sum(-1, keepdims=True), 1)
        mean = (hidden * keep[..., None]).sum(1) / counts
        results = {LAST_HIDDEN_STATE: hidden, SENTENCE_EMBEDDING: mean, LOGITS: mean @ head}
        return {name: array.astype(self.dtype) for name, array in results.items()}
