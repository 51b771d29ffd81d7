"""The check of encoders: its cases, and that it sees what can go wrong."""

from __future__ import annotations

import numpy as np
import pytest
from numpy_encoder import POSITIONS, SEGMENTS, SIGNATURE, VOCAB, NumpyEncoder
from rich.console import Console

from peft_deploy.errors import ConfigError
from peft_deploy.parity import CaseMatrix, check
from peft_deploy.parity.cases import MIN_POSITIONS
from peft_deploy.parity.encoder_cases import EncoderSizes, build_encoder_matrix
from peft_deploy.signature import LAST_HIDDEN_STATE, LOGITS, SENTENCE_EMBEDDING

PAD = 4


def sizes(**changed: int) -> EncoderSizes:
    usual = {
        "vocab_size": VOCAB,
        "max_positions": POSITIONS,
        "pad_id": PAD,
        "segments": SEGMENTS,
    }
    return EncoderSizes(**{**usual, **changed})


@pytest.fixture
def matrix() -> CaseMatrix:
    return build_encoder_matrix(SIGNATURE, sizes())


def test_texts_hold_every_token_but_padding_and_both_segments() -> None:
    ids = np.concatenate(
        [
            t.ids
            for seed in range(30)
            for t in build_encoder_matrix(SIGNATURE, sizes(), seed=seed).texts
        ]
    )
    assert set(ids.tolist()) == set(range(VOCAB)) - {PAD}
    first = build_encoder_matrix(SIGNATURE, sizes()).texts[0]
    assert first.types is not None
    assert first.types.tolist() == sorted(first.types.tolist()) and set(first.types) == {0, 1}


def test_cases_cover_both_sides_batches_and_the_last_position(matrix: CaseMatrix) -> None:
    masks = [case.attention_mask for case in matrix.cases]
    assert any(mask[:, 0].min() == 0 for mask in masks)
    assert any(mask[:, -1].min() == 0 for mask in masks)
    assert max(len(mask) for mask in masks) == 3
    assert max(mask.sum(-1).max() for mask in masks) == POSITIONS
    for case in matrix.cases:
        assert (case.input_ids[case.attention_mask == 0] == PAD).all()
        assert (case.token_type_ids[case.attention_mask == 0] == 0).all()
        # texts are never cut: every token sees all others
        assert case.attention_mask.sum(-1).tolist() == [len(text) for text in case.texts]


def test_the_seed_decides_everything() -> None:
    first, again, other = (
        [t.ids.tolist() for t in build_encoder_matrix(SIGNATURE, sizes(), seed=seed).texts]
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_what_cannot_be_checked_is_said() -> None:
    with pytest.raises(ConfigError, match=f"the model has {MIN_POSITIONS - 1}"):
        build_encoder_matrix(SIGNATURE, sizes(max_positions=MIN_POSITIONS - 1))
    with pytest.raises(ConfigError, match=f"token {VOCAB}"):
        build_encoder_matrix(SIGNATURE, sizes(), real_ids=[*range(5), VOCAB])


def test_a_good_bundle_passes_and_the_report_reads_well(matrix: CaseMatrix) -> None:
    report = check(NumpyEncoder(), NumpyEncoder(), matrix)
    assert report.passed and not report.warnings and report.exact
    assert set(report.limits) == {LAST_HIDDEN_STATE, SENTENCE_EMBEDDING, LOGITS}
    assert report.generation is None
    console = Console(width=100, record=True, file=None, force_terminal=False)
    with console.capture() as captured:
        console.print(report.table())
    text = captured.get()
    assert "longest text" in text and "greedy" not in text
    assert "The adapter changes the logits" in text


def test_without_logits_the_first_output_stands_for_all(matrix: CaseMatrix) -> None:
    report = check(NumpyEncoder(), NumpyEncoder(), matrix)
    assert report.effect is not None
    hidden = {k: v for k, v in report.effect.differences.items() if k == LAST_HIDDEN_STATE}
    effect = type(report.effect)(hidden, report.limits)
    assert effect.subject == LAST_HIDDEN_STATE
    assert effect.to_dict()["output"] == LAST_HIDDEN_STATE
    assert effect.to_dict()["max_abs"] > 0


@pytest.mark.parametrize(
    ("broken", "group", "output"),
    [
        (NumpyEncoder(masked=False), "padding on the right", SENTENCE_EMBEDDING),
        (NumpyEncoder(segments=False), "no padding", LAST_HIDDEN_STATE),
        (NumpyEncoder(counted=False), "padding on the left", LAST_HIDDEN_STATE),
        (NumpyEncoder(adapter=0.99), "longest text", LOGITS),
        (NumpyEncoder(adapter=0.0), "no padding", LOGITS),
    ],
)
def test_faults_are_found(
    broken: NumpyEncoder, group: str, output: str, matrix: CaseMatrix
) -> None:
    report = check(NumpyEncoder(), broken, matrix)
    assert not report.passed
    failed = {
        (case.group, name)
        for case in report.cases
        for name, result in case.outputs.items()
        if not result.passed
    }
    assert (group, output) in failed


def test_one_wrong_row_of_a_batch_is_found(matrix: CaseMatrix) -> None:
    class OneRowOff(NumpyEncoder):
        def run(self, feeds, outputs=None):  # type: ignore[no-untyped-def]
            results = super().run(feeds, outputs)
            if len(results[LOGITS]) == 3:
                results[LOGITS][2] += 1e-3
            return results

    report = check(NumpyEncoder(), OneRowOff(), matrix)
    wrong = [case for case in report.cases if not case.passed]
    assert {case.group for case in wrong} == {
        "padding on the left",
        "padding on the right",
        "padding mixed",
    }
    worst = wrong[0].outputs[LOGITS].difference
    assert worst.index[0] == 2 and worst.max_abs == pytest.approx(1e-3, rel=1e-2)
