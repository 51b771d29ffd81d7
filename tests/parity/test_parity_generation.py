from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from peft_deploy.parity import Limit, Prompt, compare_generation
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


def test_equal_generations_pass() -> None:
    result = compare_generation(Scripted(), Scripted(), PROMPTS, 6, LIMIT, Silent())
    assert result.passed and result.ties == 0
    assert [p.expected for p in result.prompts] == [(2, 3, 4, 5, 6, 7), (5, 6, 7, 8, 9, 0)]
    assert [p.actual for p in result.prompts] == [p.expected for p in result.prompts]


def test_the_first_difference_is_reported() -> None:
    result = compare_generation(Scripted(), Scripted({3: (0, 11.0)}), PROMPTS, 6, LIMIT, Silent())
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
    result = compare_generation(reference, bundle, PROMPTS, 6, LIMIT, Silent())
    assert result.passed and result.ties == 2
    divergence = result.prompts[0].divergence
    assert divergence is not None and divergence.is_tie
    assert divergence.gap == pytest.approx(0.01, abs=1e-4)


def test_a_flip_to_a_token_that_was_no_rival_is_a_failure() -> None:
    """The margin to the second-best token is tiny, but the bundle took a third."""
    reference = Scripted({3: (0, 9.99)})
    bundle = Scripted({3: (8, 10.005)})
    result = compare_generation(reference, bundle, PROMPTS, 6, LIMIT, Silent())
    divergence = result.prompts[0].divergence
    assert divergence is not None and divergence.margin < divergence.noise < divergence.gap
    assert not result.passed
