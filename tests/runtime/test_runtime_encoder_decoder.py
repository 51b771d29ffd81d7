"""Two graphs as one runner, with small stand-ins for the graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from peft_deploy.errors import ConfigError, ExecutionError
from peft_deploy.parity.cases import build_matrix
from peft_deploy.parity.encoder_cases import EncoderSizes, build_encoder_matrix
from peft_deploy.runtime import EncoderDecoderRunner, GenerationOptions, generate
from peft_deploy.runtime.runner import Array
from peft_deploy.signature import (
    ENCODER_ATTENTION_MASK,
    ENCODER_INPUT_IDS,
    GraphSignature,
    causal_lm_signature,
    cross_attention_signatures,
    decoder_alone,
    joint_signature,
)

LAYERS, HEADS, DIM, VOCAB = 2, 1, 1, 50
ENCODER, DECODER = cross_attention_signatures(
    num_layers=LAYERS, num_heads=HEADS, head_dim=DIM, vocab_size=VOCAB
)
START = 4


class Encoder:
    """Its keys are its tokens, its values are theirs doubled; counts how often it reads."""

    signature = ENCODER

    def __init__(self) -> None:
        self.calls = 0

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        self.calls += 1
        ids = feeds["input_ids"][:, None, :, None].astype(np.float32)
        return {n: ids * (2 if n.endswith("value") else 1) for n in ENCODER.output_names}


class Decoder:
    """Says the sum of the source's real tokens and of all that was written, modulo the vocabulary."""

    signature = DECODER

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        assert set(feeds) == set(DECODER.input_names)
        real = feeds[ENCODER_ATTENTION_MASK]
        source = (feeds["encoder.1.key"][:, 0, :, 0] * real).sum(-1)
        assert (feeds["encoder.0.value"] == 2 * feeds["encoder.0.key"]).all()
        new = feeds["input_ids"][:, None, :, None].astype(np.float32)
        present = np.concatenate([feeds["past_key_values.0.key"], new], axis=2)
        seen = present[:, 0, :, 0] * feeds["attention_mask"]
        logits = np.zeros((*feeds["input_ids"].shape, VOCAB), np.float32)
        for row, total in enumerate(seen.sum(-1) + source):
            logits[row, -1, int(total) % VOCAB] = 1
        made = dict.fromkeys(DECODER.output_names, present) | {"logits": logits}
        return {n: made[n] for n in outputs or DECODER.output_names}


def said(source: Sequence[int], steps: int) -> list[int]:
    written = [START]
    for _ in range(steps):
        written.append((sum(source) + sum(written)) % VOCAB)
    return written[1:]


def test_the_source_is_read_once_and_every_row_has_its_own() -> None:
    encoder = Encoder()
    runner = EncoderDecoderRunner(encoder, Decoder(), START)
    ids = np.array([[7, 8, 9], [33, 5, 33]])
    mask = np.array([[1, 1, 1], [0, 1, 0]])
    reading = runner.reading(ids, mask)
    results = generate(reading, [[START]] * 2, GenerationOptions(max_new_tokens=6))
    assert [list(r.token_ids) for r in results] == [said([7, 8, 9], 6), said([5], 6)]
    assert encoder.calls == 1


def test_rows_and_sources_must_be_as_many() -> None:
    runner = EncoderDecoderRunner(Encoder(), Decoder(), START)
    reading = runner.reading(np.ones((2, 3), np.int64), np.ones((2, 3), np.int64))
    with pytest.raises(ExecutionError, match=r"3 rows .* 2 source texts"):
        generate(reading, [[START]] * 3, GenerationOptions(max_new_tokens=1))
    with pytest.raises(ConfigError, match=r"\[2, 3\] .* \[2, 4\]"):
        runner.reading(np.ones((2, 3), np.int64), np.ones((2, 4), np.int64))


def test_both_as_one_check_what_they_are_given() -> None:
    runner = EncoderDecoderRunner(Encoder(), Decoder(), START)
    feeds: dict[str, Array] = {
        ENCODER_INPUT_IDS: np.array([[3, 4]]),
        ENCODER_ATTENTION_MASK: np.array([[1, 1]]),
        "input_ids": np.array([[START]]),
        "attention_mask": np.array([[1]]),
    }
    past = [spec.name for spec in DECODER.past]
    feeds |= {name: np.zeros((1, HEADS, 0, DIM), np.float32) for name in past}
    assert runner.run(feeds, ["logits"])["logits"].argmax(-1).tolist() == [[3 + 4 + START]]
    with pytest.raises(ExecutionError, match=r"source = 2 in encoder_input_ids|source = 3"):
        runner.run({**feeds, ENCODER_ATTENTION_MASK: np.array([[1, 1, 1]])})
    with pytest.raises(ExecutionError, match="encoder_input_ids holds the value 50"):
        runner.run({**feeds, ENCODER_INPUT_IDS: np.array([[3, VOCAB]])})
    with pytest.raises(ExecutionError, match="inputs are missing"):
        runner.run({name: a for name, a in feeds.items() if name != ENCODER_INPUT_IDS})


def test_signatures_of_the_parts_fit_together() -> None:
    assert ENCODER.output_names == [spec.name for spec in DECODER.cross]
    alone = causal_lm_signature(
        num_layers=LAYERS, num_kv_heads=HEADS, head_dim=DIM, vocab_size=VOCAB, positions=False
    )
    assert decoder_alone(DECODER) == alone
    joint = joint_signature(ENCODER, DECODER)
    assert joint.input_names == [ENCODER_INPUT_IDS, ENCODER_ATTENTION_MASK, *alone.input_names]
    assert (joint.outputs, joint.cross, joint.num_layers) == (DECODER.outputs, (), LAYERS)
    assert GraphSignature.from_dict(DECODER.to_dict()) == DECODER


def test_every_text_of_the_matrix_has_a_source_of_its_own() -> None:
    matrix = build_matrix(joint_signature(ENCODER, DECODER), 512, seed=5)
    sources = [text.source for text in matrix.texts]
    assert len({tuple(source) for source in sources if source is not None}) == len(sources)
    batch = next(case for case in matrix.cases if case.name == "left padding")
    lengths = [
        len(source) for source in (text.source for text in batch.texts) if source is not None
    ]
    assert len(set(lengths)) == 3
    assert batch.source_mask.sum(-1).tolist() == lengths
    firsts = batch.source_mask.argmax(-1).tolist()
    assert firsts[0] == 0 and firsts[1] == max(lengths) - lengths[1]
    for row, text in enumerate(batch.texts):
        assert batch.source_ids[row][batch.source_mask[row] == 1].tolist() == text.source.tolist()
    assert max(map(len, matrix.texts)) > 128


def test_a_model_of_one_graph_has_the_texts_that_it_always_had() -> None:
    matrix = build_matrix(decoder_alone(DECODER), 512, seed=5)
    assert all(text.source is None for text in matrix.texts)
    ids = np.random.default_rng(5).integers(0, VOCAB, 20)
    assert matrix.texts[0].ids.tolist() == ids.tolist()


def test_an_encoder_of_keys_and_values_is_checked_token_by_token() -> None:
    sizes = EncoderSizes(vocab_size=VOCAB, max_positions=64, pad_id=0, segments=1)
    matrix = build_encoder_matrix(ENCODER, sizes)
    from peft_deploy.parity.play import expected, read_text, run_case

    known = {text: read_text(Encoder(), text) for text in matrix.texts}
    for case in matrix.cases:
        have, want = run_case(Encoder(), case, {}), expected(case, known, ENCODER)
        for name, values in want.values.items():
            kept = case.counts[:, None, :, None]
            np.testing.assert_array_equal(have.values[name] * kept, values)
