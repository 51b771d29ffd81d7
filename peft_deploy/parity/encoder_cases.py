"""The case matrix of an encoder.

Every token of a text sees every other, so that texts are always read whole; a case arranges them in a batch, with
padding on either side. What a text has to give is what it gives alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from peft_deploy.errors import ConfigError
from peft_deploy.families import Family
from peft_deploy.parity.cases import (
    MIN_POSITIONS,
    PADDING,
    REAL_LENGTH,
    Case,
    CaseMatrix,
    IntArray,
    Text,
    padded,
    whole,
)
from peft_deploy.signature import TOKEN_TYPE_IDS, GraphSignature

LENGTHS = (20, 13, 7)
LONGEST = 4096  # attention is quadratic in the length: beyond it the check would not end
PLAIN, LAST = "no padding", "longest text"


@dataclass(frozen=True, kw_only=True)
class EncoderSizes:
    """What texts for an encoder have to keep to.

    Args:
        vocab_size: number of tokens.
        max_positions: that a text can have.
        pad_id: the token of padding, which no text holds.
        segments: how many ``token_type_ids`` there are.
    """

    vocab_size: int
    max_positions: int
    pad_id: int
    segments: int

    @classmethod
    def of(cls, family: Family, config: Mapping[str, Any]) -> EncoderSizes:
        """Those of the model that a config.json describes."""
        dims = family.dims(config)
        return cls(
            vocab_size=dims.vocab_size,
            max_positions=dims.max_positions,
            pad_id=config.get("pad_token_id") or 0,
            segments=int(config.get("type_vocab_size") or 2),
        )


def build_encoder_matrix(
    signature: GraphSignature,
    sizes: EncoderSizes,
    *,
    real_ids: Sequence[int] | None = None,
    seed: int = 0,
) -> CaseMatrix:
    """The case matrix of an encoder.

    Args:
        signature: of the graph.
        sizes: of the model; the last of its positions is among the cases.
        real_ids: tokens of real text; random ones take their place when there are none.
        seed: of the random tokens.

    Raises:
        ConfigError: the position table is too small, or a token is outside the vocabulary.
    """
    if sizes.max_positions < MIN_POSITIONS:
        raise ConfigError(
            f"the parity check needs room for {MIN_POSITIONS} positions; "
            f"the model has {sizes.max_positions}"
        )
    rng = np.random.default_rng(seed)
    segments = sizes.segments if TOKEN_TYPE_IDS in signature.input_names else 1

    def draw(name: str, length: int) -> Text:
        # One token fewer to choose from, and those from the padding token on are moved up.
        ids = rng.integers(0, sizes.vocab_size - 1, length, dtype=np.int64)
        ids += ids >= sizes.pad_id
        return Text(name, ids, types=rng.integers(0, segments, length, dtype=np.int64))

    lengths = [min(n, sizes.max_positions - i) for i, n in enumerate(LENGTHS)]
    mixed = [draw(f"random tokens {i + 1}", n) for i, n in enumerate(lengths)]
    mixed[0] = replace(mixed[0], types=_halves(lengths[0], segments))
    equal = draw("random tokens of equal length", len(mixed[1]))
    single = draw("one token", 1)
    longest = draw(LAST, min(sizes.max_positions, LONGEST))
    prose = _prose(draw, sizes, real_ids)
    cases = _cases(mixed, equal, single, prose, longest)
    return CaseMatrix(
        texts=(*mixed, equal, single, prose, longest),
        cases=tuple(replace(case, pad_id=sizes.pad_id) for case in cases),
    )


def _halves(length: int, segments: int) -> IntArray:
    """The segments of two sentences, one behind the other."""
    types = np.zeros(length, np.int64)
    types[length // 2 :] = min(1, segments - 1)
    return types


def _prose(draw: Any, sizes: EncoderSizes, real_ids: Sequence[int] | None) -> Text:
    length = min(REAL_LENGTH, sizes.max_positions)
    if real_ids is None:
        text: Text = draw("random tokens in place of text", length)
        return text
    ids = np.asarray(real_ids[:length], np.int64)
    if ids.min() < 0 or ids.max() >= sizes.vocab_size:
        raise ConfigError(
            f"the tokenizer gives token {ids.max()}; "
            f"the model's vocabulary ends at {sizes.vocab_size - 1}",
            hint="the tokenizer and the model do not belong together",
        )
    return Text("real text", ids)


def _cases(
    mixed: Sequence[Text], equal: Text, single: Text, prose: Text, longest: Text
) -> list[Case]:
    pair = [mixed[1], equal]
    return [
        _case(PLAIN, "one token", [single], whole([single])),
        _case(PLAIN, "two segments", mixed[:1], whole(mixed[:1])),
        _case(PLAIN, "text", [prose], whole([prose])),
        _case(PLAIN, "batch 2", pair, whole(pair)),
        _case("padding on the right", "right padding", mixed, padded(mixed, "rrr")),
        _case("padding on the left", "left padding", mixed, padded(mixed, "lll")),
        _case("padding mixed", "padding mixed", mixed, padded(mixed, "rlb")),
        _case(LAST, LAST, [longest], whole([longest])),
        _case(LAST, "beside a short one", [longest, mixed[2]], _beside(longest, mixed[2])),
    ]


def _beside(longest: Text, short: Text) -> IntArray:
    """The two in one batch, not a token wider than the longer one."""
    slots = np.full((2, len(longest)), PADDING, np.int64)
    slots[0] = np.arange(len(longest))
    slots[1, : len(short)] = np.arange(len(short))
    return slots


def _case(group: str, name: str, texts: Sequence[Text], slots: IntArray) -> Case:
    return Case(name, group, tuple(texts), slots, (slots.shape[1],))
