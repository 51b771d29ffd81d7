"""The case matrix: what both sides compute, generated from a graph's signature.

A model has to give a token the same outputs however it gets there: alone or in a batch, padded on
either side, in one call, in chunks or one by one through the cache. So the matrix has two levels.
A few :class:`Text` objects are plain token sequences, which the reference reads once each, alone
and unpadded. A :class:`Case` is an arrangement of those texts (rows, padding, calls, a given
cache), and what it must give at every real token is already known. The reference's own handling of
padding and cache is therefore never the measure; it is checked like everybody's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from peft_deploy.errors import ConfigError
from peft_deploy.signature import ENCODER_INPUT_IDS, LOGITS, POSITION_IDS, GraphSignature

IntArray = npt.NDArray[np.int64]

PADDING = -1  # the slot of a padding token
MIN_POSITIONS = 16
RANDOM_LENGTHS = (20, 13, 7)
REAL_LENGTH = 32
EDGE_LENGTH = 5
DECODE_STEPS = 3
LAST = "last positions"
DISTANT = "distant tokens"
DISTANT_LENGTH = 160  # beyond the distances that models with a bias for each of them tell apart


@dataclass(frozen=True, eq=False)
class Text:
    """A token sequence.

    Args:
        name: for messages.
        ids: the tokens, [N].
        start: position of the first one; not 0 only to reach the end of the position table.
        types: the segment of every token, [N]; all in segment 0 when None.
        source: what an encoder reads before, [M]; None for a model of one graph.
    """

    name: str
    ids: IntArray
    start: int = 0
    types: IntArray | None = None
    source: IntArray | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class Case:
    """An arrangement of texts in a batch, and the calls in which it is computed.

    Args:
        name: unique in the matrix.
        group: the line of the report that it counts in.
        texts: the text of each row, [B].
        slots: what stands where, [B, T]: an index into the row's text, or :data:`PADDING`.
        calls: number of new tokens of each call; each call's cache is fed to the next.
        given: leading slots that are not computed: their cache comes from the reference.
        pad_id: the token at padding slots. Its cache must not matter, so it is not a special
            token.
    """

    name: str
    group: str
    texts: tuple[Text, ...]
    slots: IntArray
    calls: tuple[int, ...]
    given: int = 0
    pad_id: int = 0

    def __post_init__(self) -> None:
        if self.slots.shape != (len(self.texts), self.given + sum(self.calls)):
            raise ValueError(f"{self.name}: slots {self.slots.shape} do not fit rows and calls")

    @property
    def counts(self) -> npt.NDArray[np.bool_]:
        """Where a real token stands, [B, T]: outputs at padding slots mean nothing."""
        return np.not_equal(self.slots, PADDING)

    @property
    def input_ids(self) -> IntArray:
        """[B, T]."""
        return self._of_tokens([text.ids for text in self.texts], self.pad_id)

    @property
    def token_type_ids(self) -> IntArray:
        """[B, T]: the segment of every token, 0 at padding."""
        types = [np.zeros_like(t.ids) if t.types is None else t.types for t in self.texts]
        return self._of_tokens(types, 0)

    @property
    def source_ids(self) -> IntArray:
        """[B, M]: what an encoder reads of each row, on the right of the padding in every other row."""
        return self._sources([_source(text) for text in self.texts], self.pad_id)

    @property
    def source_mask(self) -> IntArray:
        """[B, M], 1 = attend."""
        return self._sources([np.ones_like(_source(text)) for text in self.texts], 0)

    def _sources(self, rows: Sequence[IntArray], padding: int) -> IntArray:
        width = max(map(len, rows))
        placed = np.full((len(rows), width), padding, np.int64)
        for row, values in enumerate(rows):
            first = width - len(values) if row % 2 else 0
            placed[row, first : first + len(values)] = values
        return placed

    def _of_tokens(self, rows: Sequence[IntArray], padding: int) -> IntArray:
        placed = [
            np.where(slots == PADDING, padding, row[np.maximum(slots, 0)])
            for row, slots in zip(rows, self.slots, strict=True)
        ]
        ids: IntArray = np.stack(placed).astype(np.int64)
        return ids

    @property
    def attention_mask(self) -> IntArray:
        """[B, T], 1 = attend."""
        return self.counts.astype(np.int64)

    @property
    def position_ids(self) -> IntArray:
        """[B, T]: real tokens are counted from their text's start, padding has 0."""
        starts = np.array([[text.start] for text in self.texts], np.int64)
        return np.where(self.counts, self.slots + starts, 0).astype(np.int64)

    def describe(self) -> str:
        """The shape in words: ``batch 3, past 8, calls of 1+1+1 tokens``."""
        calls = "+".join(map(str, self.calls))
        return f"batch {len(self.texts)}, past {self.given}, calls of {calls} tokens"


@dataclass(frozen=True, eq=False)
class CaseMatrix:
    """The texts, and their arrangements."""

    texts: tuple[Text, ...]
    cases: tuple[Case, ...]


def build_matrix(
    signature: GraphSignature,
    max_positions: int,
    *,
    real_ids: Sequence[int] | None = None,
    seed: int = 0,
) -> CaseMatrix:
    """The case matrix of a decoder.

    Args:
        signature: of the graph; gives the vocabulary's size.
        max_positions: size of the position table; its last position is among the cases.
        real_ids: tokens of real text; random ones take their place when there are none.
        seed: of the random tokens.

    Raises:
        ConfigError: the position table is too small, or a token is outside the vocabulary.
    """
    vocab_size = _vocab_size(signature)
    if max_positions < MIN_POSITIONS:
        raise ConfigError(
            f"the parity check needs room for {MIN_POSITIONS} positions; "
            f"the model has {max_positions}"
        )
    rng = np.random.default_rng(seed)
    reads = ENCODER_INPUT_IDS in signature.input_names

    def tokens(length: int) -> IntArray:
        return rng.integers(0, vocab_size, length, dtype=np.int64)

    def draw(name: str, length: int, start: int = 0) -> Text:
        ids = tokens(length)
        return Text(name, ids, start, source=tokens(_source_length(length)) if reads else None)

    lengths = [min(n, max_positions - i) for i, n in enumerate(RANDOM_LENGTHS)]
    shuffled = [draw(f"random tokens {i + 1}", n) for i, n in enumerate(lengths)]
    real_length = min(REAL_LENGTH, max_positions)
    if real_ids is None:
        prose = draw("random tokens in place of text", real_length)
    else:
        read = np.asarray(real_ids[:REAL_LENGTH], np.int64)
        prose = Text("real text", read[:real_length], source=read if reads else None)
        _check_vocabulary(prose, vocab_size)
    # Without position_ids a token's position is its place: only a text that long would reach the last ones.
    reaches = POSITION_IDS in signature.input_names
    edge = [draw(LAST, EDGE_LENGTH, start=max_positions - EDGE_LENGTH)] if reaches else []
    # Nothing else in the check brings two tokens of such a decoder as far apart.
    far = [draw(DISTANT, min(DISTANT_LENGTH, max_positions))] if reads and not reaches else []
    pad_id = int(rng.integers(0, vocab_size))
    cases = [
        *_plain(shuffled, prose),
        *_padded(shuffled),
        *_cached(shuffled, prose),
        *_at_end(edge),
        *_distant(far),
    ]
    return CaseMatrix(
        texts=(*shuffled, prose, *edge, *far),
        cases=tuple(replace(case, pad_id=pad_id) for case in cases),
    )


def _source(text: Text) -> IntArray:
    return np.zeros(0, np.int64) if text.source is None else text.source


def _source_length(length: int) -> int:
    """Of the source of a text: shorter than a long one, longer than a short one."""
    return max(1, 24 - length)


def _vocab_size(signature: GraphSignature) -> int:
    spec = next((s for s in signature.outputs if s.name == LOGITS), None)
    if spec is None or not isinstance(spec.dims[-1], int):
        raise ConfigError(f"the graph's signature has no {LOGITS} with a fixed vocabulary")
    return spec.dims[-1]


def _check_vocabulary(text: Text, vocab_size: int) -> None:
    if len(text) < MIN_POSITIONS:
        raise ConfigError(
            f"{text.name} has {len(text)} tokens; at least {MIN_POSITIONS} are needed"
        )
    if text.ids.min() < 0 or text.ids.max() >= vocab_size:
        raise ConfigError(
            f"the tokenizer gives token {text.ids.max()}; "
            f"the model's vocabulary ends at {vocab_size - 1}",
            hint="the tokenizer and the model do not belong together",
        )


def _case(
    group: str,
    name: str,
    texts: Sequence[Text],
    slots: IntArray,
    calls: Sequence[int] | None = None,
    given: int = 0,
) -> Case:
    calls = (slots.shape[1] - given,) if calls is None else calls
    return Case(name, group, tuple(texts), slots, tuple(calls), given)


def whole(texts: Sequence[Text], length: int | None = None) -> IntArray:
    """Slots of the first ``length`` tokens of every text, without padding (the shortest text's
    when None).
    """
    length = min(map(len, texts)) if length is None else length
    return np.tile(np.arange(length, dtype=np.int64), (len(texts), 1))


def padded(texts: Sequence[Text], sides: str) -> IntArray:
    """Slots of whole texts in rows as long as the longest and two more.

    Args:
        texts: one a row.
        sides: a letter for each row, where its padding stands: l, r, or b for both sides.
    """
    width = max(map(len, texts)) + 2
    slots = np.full((len(texts), width), PADDING, np.int64)
    for row, (text, side) in enumerate(zip(texts, sides, strict=True)):
        free = width - len(text)
        first = {"l": free, "r": 0, "b": free // 2}[side]
        slots[row, first : first + len(text)] = np.arange(len(text))
    return slots


def continued(texts: Sequence[Text], prompts: Sequence[int], steps: int, side: str) -> IntArray:
    """Slots of padded prompts that go on for ``steps`` tokens, as in batched generation.

    Right-padded prompts leave a gap of padding between the prompt and what follows.
    """
    width = max(prompts)
    slots = np.full((len(texts), width + steps), PADDING, np.int64)
    for row, n in enumerate(prompts):
        first = width - n if side == "l" else 0
        slots[row, first : first + n] = np.arange(n)
        slots[row, width:] = np.arange(n, n + steps)
    return slots


def _plain(shuffled: list[Text], prose: Text) -> list[Case]:
    one, many = "one token, no past", "many tokens, no past"
    return [
        _case(one, "one token", [prose], whole([prose], 1)),
        _case(one, "one token, batch 3", shuffled, whole(shuffled, 1)),
        _case(many, "random tokens", shuffled[:1], whole(shuffled[:1])),
        _case(many, prose.name, [prose], whole([prose])),
        _case(many, "batch 3", shuffled, whole(shuffled)),
    ]


def _padded(shuffled: list[Text]) -> list[Case]:
    return [
        _case("padding on the left", "left padding", shuffled, padded(shuffled, "lll")),
        _case("padding on the right", "right padding", shuffled, padded(shuffled, "rrr")),
        _case("padding mixed", "padding mixed", shuffled, padded(shuffled, "rlb")),
    ]


def _cached(shuffled: list[Text], prose: Text) -> list[Case]:
    one, many = "past of one token", "past of many tokens"
    chunks, decode = "prefill in chunks", "decode with cache"
    first = shuffled[:1]
    half = len(shuffled[0]) // 2
    left = padded(shuffled, "lll")
    rest = len(prose) - 9
    prompts = [len(text) - DECODE_STEPS for text in shuffled]
    steps = (1,) * DECODE_STEPS
    gap, full = (continued(shuffled, prompts, DECODE_STEPS, side) for side in "rl")
    prefill = gap.shape[1] - DECODE_STEPS
    pieces = (3, left.shape[1] // 2, left.shape[1] - left.shape[1] // 2 - 3)
    return [
        _case(one, "past 1, one new", first, whole(first, 2), given=1),
        _case(one, "past 1, many new", first, whole(first), given=1),
        _case(one, "past 1, batch 3", shuffled, whole(shuffled), given=1),
        _case(many, "past many, one new", first, whole(first, half + 1), given=half),
        _case(many, "past many, many new", first, whole(first), given=half),
        _case(many, "past left-padded, batch 3", shuffled, left, given=left.shape[1] - 4),
        _case(many, "past right-padded, batch 3", shuffled, gap, given=prefill),
        _case(chunks, "chunks", [prose], whole([prose]), (1, 8, rest)),
        _case(chunks, "chunks, left padding", shuffled, left, pieces),
        _case(decode, "decode", [prose], whole([prose]), (len(prose) - DECODE_STEPS, *steps)),
        _case(decode, "decode, left padding", shuffled, full, (prefill, *steps)),
        _case(decode, "decode, right padding", shuffled, gap, (prefill, *steps)),
    ]


def _at_end(edge: list[Text]) -> list[Case]:
    if not edge:
        return []
    return [
        _case(LAST, LAST, edge, whole(edge)),
        _case(LAST, "decode at the last positions", edge, whole(edge), (EDGE_LENGTH - 1, 1)),
    ]


def _distant(far: list[Text]) -> list[Case]:
    steps = (1,) * DECODE_STEPS
    return [
        case
        for text in far
        for case in (
            _case(DISTANT, DISTANT, [text], whole([text])),
            _case(
                DISTANT, "decode far on", [text], whole([text]), (len(text) - len(steps), *steps)
            ),
        )
    ]


def groups(cases: Sequence[Case]) -> Mapping[str, list[Case]]:
    """The cases by group, in order of first appearance."""
    result: dict[str, list[Case]] = {}
    for case in cases:
        result.setdefault(case.group, []).append(case)
    return result
