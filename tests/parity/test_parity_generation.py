from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from peft_deploy.errors import ParityError
from peft_deploy.parity import (
    GenerationResult,
    Limit,
    Prompt,
    Scores,
    compare_generation,
    score_tokens,
)
from peft_deploy.parity.generation import RIVALS, compare_tokens
from peft_deploy.progress import Silent
from peft_deploy.signature import (
    ATTENTION_MASK,
    INPUT_IDS,
    LOGITS,
    POSITION_IDS,
    GraphSignature,
    causal_lm_signature,
    past_names,
    present_names,
)

V = 10
PROMPTS = [Prompt("one", (1,)), Prompt("three", (2, 3, 4))]
LIMIT = Limit(maximum=1e-3, mean=1e-3)


class Scripted:
    """A model whose next token is the last one plus 1, from logits of 10, with some of them changed.

    Its single cache tensor holds the tokens seen, so that a lost cache shows.
    """

    def __init__(self, changes: Mapping[int, tuple[int, float]] | None = None) -> None:
        self.changes = changes or {}  # position → (token, its logit)

    @property
    def signature(self) -> GraphSignature:
        return causal_lm_signature(num_layers=1, num_kv_heads=1, head_dim=1, vocab_size=V)

    def run(
        self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        ids, positions = feeds[INPUT_IDS], feeds[POSITION_IDS]
        assert feeds[ATTENTION_MASK].shape[1] == ids.shape[1] + feeds[past_names(1)[0]].shape[2]
        logits = np.zeros((*ids.shape, V), np.float32)
        for row, column in np.ndindex(*ids.shape):
            logits[row, column, (ids[row, column] + 1) % V] = 10
            if change := self.changes.get(int(positions[row, column])):
                logits[row, column, change[0]] = change[1]
        new = ids[:, None, :, None].astype(np.float32)
        caches = [np.concatenate([feeds[name], new], 2) for name in past_names(1)]
        return dict(zip([LOGITS, *present_names(1)], [logits, *caches], strict=True))


def generated(reference: Scripted, bundle: Scripted, new_tokens: int = 6) -> GenerationResult:
    def judge(prompt: Prompt, tokens: np.ndarray) -> Scores:
        return score_tokens(reference, prompt, tokens)

    return compare_generation(judge, bundle, PROMPTS, new_tokens, LIMIT, Silent())


def test_equal_generations_pass() -> None:
    result = generated(Scripted(), Scripted())
    assert result.passed and result.ties == 0
    assert [p.expected for p in result.prompts] == [(2, 3, 4, 5, 6, 7), (5, 6, 7, 8, 9, 0)]
    assert [p.actual for p in result.prompts] == [p.expected for p in result.prompts]
    assert [p.agreeing for p in result.prompts] == [6, 6]


def test_the_first_difference_is_reported() -> None:
    result = generated(Scripted(), Scripted({3: (0, 11.0)}))
    assert not result.passed
    one, three = (p.divergence for p in result.prompts)
    assert one is not None and three is not None
    # position 3 is the fourth token of either row: the fourth new one, the second new one
    assert (one.step, one.expected, one.actual) == (3, 5, 0)
    assert (three.step, three.expected, three.actual) == (1, 6, 0)
    assert one.gap == one.margin == 10
    assert one.noise == pytest.approx(2 * 1e-3 * 10)
    assert not one.is_tie


def test_a_flip_within_the_noise_is_a_tie() -> None:
    reference = Scripted({3: (0, 9.99)})
    bundle = Scripted({3: (0, 10.005)})
    result = generated(reference, bundle)
    assert result.passed and result.ties == 2
    divergence = result.prompts[0].divergence
    assert divergence is not None and divergence.is_tie
    assert divergence.gap == pytest.approx(0.01, abs=1e-4)


def test_what_follows_a_tie_is_checked_too() -> None:
    """Two free generations would have nothing in common any more."""
    reference = Scripted({3: (0, 9.99)})
    result = generated(reference, Scripted({3: (0, 10.005), 5: (7, 11.0)}))
    assert not result.passed
    divergence = result.prompts[0].divergence
    assert divergence is not None and not divergence.is_tie
    # after the bundle's own 0 come 1 and, at position 5, 2; the bundle says 7
    assert (divergence.step, divergence.expected, divergence.actual) == (5, 2, 7)
    assert result.prompts[0].agreeing == 4


def test_a_flip_to_a_token_that_was_no_rival_is_a_failure() -> None:
    """The margin to the second-best token is tiny, but the bundle took a third."""
    reference = Scripted({3: (0, 9.99)})
    bundle = Scripted({3: (8, 10.005)})
    result = generated(reference, bundle)
    divergence = result.prompts[0].divergence
    assert divergence is not None and divergence.margin < divergence.noise < divergence.gap
    assert not result.passed


def test_a_cache_that_is_lost_shows() -> None:
    class Forgetful(Scripted):
        def run(self, feeds, outputs=None):  # type: ignore[no-untyped-def]
            results = super().run(feeds, outputs)
            if feeds[past_names(1)[0]].shape[2]:
                results[LOGITS] = np.roll(results[LOGITS], 1, axis=-1)
            return results

    result = generated(Scripted(), Forgetful())
    assert [p.divergence and p.divergence.step for p in result.prompts] == [1, 1]


def test_logits_that_are_no_numbers_are_a_problem() -> None:
    result = generated(Scripted(), Scripted({3: (0, float("nan"))}))
    assert not result.passed
    assert result.problem is not None and "are not numbers" in result.problem
    with pytest.raises(ParityError, match="reference model gives 1 NaN or infinite logits"):
        generated(Scripted({3: (0, float("nan"))}), Scripted())


def recorded(tokens: list[int], values: list[list[float]], ids: list[list[int]]) -> Scores:
    scale = np.array([max(map(abs, row)) for row in values], np.float32)
    return Scores(np.array(tokens), np.array(ids), np.array(values, np.float32), scale)


def test_recorded_scores_judge_up_to_the_first_difference() -> None:
    """Behind it they belong to another text."""
    scores = recorded([4, 5, 6], [[10, 2]] * 3, [[4, 1], [5, 1], [6, 1]])
    result = compare_tokens(PROMPTS[0], np.array([4, 1, 9]), scores, LIMIT)
    assert not result.passed and result.compared == 2 and result.agreeing == 1
    assert result.divergence is not None
    assert (result.divergence.step, result.divergence.gap) == (1, 8)
    tie = recorded([4, 5, 6], [[10, 9.99]] * 3, [[4, 1], [5, 1], [6, 1]])
    result = compare_tokens(PROMPTS[0], np.array([4, 1, 9]), tie, LIMIT)
    assert result.passed and result.compared == 2


def test_a_token_that_was_not_recorded_is_as_far_as_the_last_that_was() -> None:
    ids = [list(range(RIVALS))]
    scores = recorded([0], [[10.0 - i for i in range(RIVALS)]], ids)
    result = compare_tokens(PROMPTS[0], np.array([RIVALS + 7]), scores, LIMIT)
    assert result.divergence is not None and result.divergence.gap == RIVALS - 1
    assert not result.passed


def test_equal_logits_are_taken_in_the_order_of_argmax() -> None:
    scores = score_tokens(Scripted({0: (9, 10.0)}), Prompt("p", (1,)), np.array([2]))
    assert scores.ids[0, 0] == 2 and scores.values[0, 1] == 10
