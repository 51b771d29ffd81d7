from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_decoder import MAX_POSITIONS, V

from peft_deploy.errors import ConfigError
from peft_deploy.parity import build_matrix
from peft_deploy.parity.cases import MIN_POSITIONS, PADDING, CaseMatrix
from peft_deploy.signature import causal_lm_signature


def signature_of(vocab_size: int = V):
    return causal_lm_signature(num_layers=2, num_kv_heads=2, head_dim=4, vocab_size=vocab_size)


def check_consistent(matrix: CaseMatrix, vocab_size: int, max_positions: int) -> None:
    for case in matrix.cases:
        B, T = case.slots.shape
        assert case.given + sum(case.calls) == T
        assert (case.input_ids >= 0).all() and (case.input_ids < vocab_size).all()
        assert (case.position_ids >= 0).all() and (case.position_ids < max_positions).all()
        assert case.counts[:, case.given :].any(), case.name
        for row in range(B):
            real = case.slots[row][case.slots[row] != PADDING]
            # causality: the texts' outputs are known only for gapless beginnings in order
            assert real.tolist() == list(range(len(real))), case.name
            start = case.texts[row].start
            positions = case.position_ids[row][case.counts[row]]
            assert positions.tolist() == list(range(start, start + len(real)))
            assert (case.position_ids[row][~case.counts[row]] == 0).all()
            assert (case.input_ids[row][case.counts[row]] == case.texts[row].ids[real]).all()
            assert (case.attention_mask[row] == case.counts[row]).all()


@settings(max_examples=30, deadline=None)
@given(
    vocab_size=st.integers(1, 500),
    max_positions=st.integers(MIN_POSITIONS, 300),
    seed=st.integers(0, 2**31),
)
def test_every_matrix_is_consistent(vocab_size: int, max_positions: int, seed: int) -> None:
    matrix = build_matrix(signature_of(vocab_size), max_positions, seed=seed)
    check_consistent(matrix, vocab_size, max_positions)
    assert max(case.position_ids.max() for case in matrix.cases) == max_positions - 1
    names = [case.name for case in matrix.cases]
    assert len(set(names)) == len(names)


def test_the_matrix_covers_what_is_promised() -> None:
    cases = build_matrix(signature_of(), MAX_POSITIONS).cases
    shapes = {(len(c.texts), c.given, c.calls) for c in cases}
    assert {len(c.texts) for c in cases} == {1, 3}
    assert (1, 0, (1,)) in shapes and (3, 0, (1,)) in shapes
    assert {min(c.given, 2) for c in cases} == {0, 1, 2}
    assert any(c.given == 1 and c.calls == (1,) for c in cases)
    assert any(c.given > 1 and c.calls == (1,) for c in cases)
    assert any(c.given > 1 and c.calls[0] > 1 for c in cases)
    assert any(len(c.calls) == 3 and min(c.calls) > 1 for c in cases)
    assert any(c.calls[-3:] == (1, 1, 1) for c in cases)
    padded = [c.slots == PADDING for c in cases if len(c.texts) == 3]
    assert any(p[:, 0].all() and not p[:, -1].any() for p in padded)
    assert any(p[:, -1].all() and not p[:, 0].any() for p in padded)
    assert any((p[:, 0] != p[:, -1]).any() and p[0, -1] and p[1, 0] for p in padded)
    inside = [
        c
        for c in cases
        if any("0" in "".join("01"[int(x)] for x in r).strip("0") for r in c.counts)
    ]
    assert inside, "no row has padding between its tokens, as right-padded prompts leave it"


def test_the_seed_decides_the_tokens() -> None:
    first, again, other = (build_matrix(signature_of(), 64, seed=s) for s in (1, 1, 2))
    ids = [[text.ids.tolist() for text in m.texts] for m in (first, again, other)]
    assert ids[0] == ids[1] != ids[2]


def test_real_tokens_are_used() -> None:
    real = list(range(20, 60))
    matrix = build_matrix(signature_of(), 64, real_ids=real)
    used = [c for c in matrix.cases if c.texts[0].name == "real text"]
    assert len(used) >= 4
    assert "real text" in {case.name for case in matrix.cases}
    without = build_matrix(signature_of(), 64)
    assert not [case for case in without.cases if "real text" in case.name]
    assert used[1].input_ids[0].tolist() == real[: used[1].input_ids.shape[1]]


def test_a_foreign_tokenizer_is_an_error() -> None:
    with pytest.raises(
        ConfigError, match=f"gives token {V}; the model's vocabulary ends at {V - 1}"
    ):
        build_matrix(signature_of(), 64, real_ids=[*range(30), V])


def test_a_tiny_position_table_is_an_error() -> None:
    with pytest.raises(ConfigError, match="room for 16 positions; the model has 15"):
        build_matrix(signature_of(), MIN_POSITIONS - 1)


def test_shapes_that_do_not_fit_are_refused() -> None:
    case = build_matrix(signature_of(), 64).cases[0]
    with pytest.raises(ValueError, match="do not fit"):
        type(case)("bad", "group", case.texts, np.zeros((1, 3), np.int64), (1, 1))
