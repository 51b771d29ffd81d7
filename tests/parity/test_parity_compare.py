from __future__ import annotations

import json

import numpy as np
import pytest

from peft_deploy.parity import measure

ONE = np.ones((1, 2), bool)


def logits(*rows: list[float]) -> np.ndarray:
    return np.array([rows], np.float32)


def test_metrics_of_logits_by_hand() -> None:
    want = logits([1.0, 2.0, -4.0], [0.0, 1.0, 0.5])
    have = logits([1.5, 2.0, -4.0], [0.0, 1.0, 0.25])
    d = measure(want, have, ONE, axis=1, logits=True)
    assert d.max_abs == 0.5
    assert d.mean_abs == pytest.approx(0.75 / 6)
    assert d.p99_abs == 0.5
    assert d.scale == 4.0
    assert d.relative_max == 0.125
    assert (d.index, d.expected, d.actual) == ((0, 0, 0), 1.0, 1.5)
    assert d.top1 == 1.0
    assert d.unequal_specials == 0
    a, b = want.ravel(), have.ravel()
    assert d.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_divergence_and_agreement_of_the_next_token() -> None:
    want, have = (
        np.log(np.array([[[0.7, 0.3], [0.2, 0.8]]], np.float32)),
        np.log(np.array([[[0.4, 0.6], [0.2, 0.8]]], np.float32)),
    )
    d = measure(want, have, ONE, axis=1, logits=True)
    assert d.top1 == 0.5
    assert d.kl == pytest.approx(0.7 * np.log(0.7 / 0.4) + 0.3 * np.log(0.3 / 0.6), rel=1e-5)


def test_the_index_of_a_cache_is_in_its_own_axes() -> None:
    want = np.zeros((2, 3, 4, 5), np.float32)
    have = want.copy()
    have[1, 2, 3, 4] = -7
    d = measure(want, have, np.ones((2, 4), bool), axis=2, logits=False)
    assert (d.index, d.actual, d.top1, d.kl) == ((1, 2, 3, 4), -7.0, None, None)
    assert d.scale == 0 and d.relative_max == float("inf")


def test_padding_does_not_count() -> None:
    want = np.ones((1, 2, 3, 2), np.float32)
    have = want.copy()
    have[0, :, 1] = 99
    assert measure(want, have, np.array([[True, False, True]]), axis=2, logits=False).max_abs == 0
    assert measure(want, have, np.array([[True, True, True]]), axis=2, logits=False).max_abs == 98


def test_equal_infinities_are_equal() -> None:
    want = logits([np.inf, 1.0], [-np.inf, 2.0])
    d = measure(want, want.copy(), ONE, axis=1, logits=True)
    assert (d.max_abs, d.mean_abs, d.unequal_specials, d.scale) == (0, 0, 0, 2)


@pytest.mark.parametrize(
    ("expected", "actual"),
    [
        (np.nan, np.nan),
        (1.0, np.nan),
        (np.nan, 1.0),
        (np.inf, -np.inf),
        (1.0, np.inf),
        (np.inf, 1.0),
    ],
)
def test_other_specials_are_never_equal(expected: float, actual: float) -> None:
    want, have = logits([expected, 1.0], [0.5, 2.0]), logits([actual, 1.0], [0.5, 2.0])
    d = measure(want, have, ONE, axis=1, logits=True)
    assert d.max_abs == float("inf")
    assert d.unequal_specials == 1
    assert d.index == (0, 0, 0)


def test_a_nan_at_padding_counts() -> None:
    want, have = logits([1.0, 2.0], [0.0, 0.0]), logits([1.0, 2.0], [0.0, np.nan])
    d = measure(want, have, np.array([[True, False]]), axis=1, logits=True)
    assert (d.max_abs, d.unequal_specials, d.index) == (float("inf"), 1, (0, 1, 1))


def test_the_json_form_has_no_bare_specials() -> None:
    d = measure(logits([1.0], [1.0]), logits([np.nan], [1.0]), ONE, axis=1, logits=True)
    data = json.loads(json.dumps(d.to_dict(), allow_nan=False))
    assert data["max_abs"] == "inf" and data["actual"] == "nan"


def test_brief_leaves_the_decisive_metrics_alone() -> None:
    rng = np.random.default_rng(0)
    want, have = (rng.standard_normal((1, 2, 50)).astype(np.float32) for _ in range(2))
    full, brief = (measure(want, have, ONE, axis=1, logits=True, brief=b) for b in (False, True))
    assert (full.max_abs, full.mean_abs, full.scale, full.index) == (
        brief.max_abs,
        brief.mean_abs,
        brief.scale,
        brief.index,
    )
    assert brief.top1 is None and full.top1 is not None


def test_five_best_tokens_and_the_histogram() -> None:
    want = np.zeros((1, 2, 8), np.float32)
    want[..., :6] = [6, 5, 4, 3, 2, 1]
    have = want.copy()
    have[0, 1, 6] = 5.5  # a sixth among the best five of the second token: 6 takes the place of 2
    d = measure(want, have, np.ones((1, 2), bool), axis=1, logits=True)
    assert d.top1 == 1.0 and d.top5 == pytest.approx(9 / 10)
    assert d.kl is not None and d.kl > 0.1
    assert sum(d.histogram) == 16 and d.histogram[0] == 15
    assert d.histogram[-2] == 1  # 5.5 of a scale of 6
    brief = measure(want, have, np.ones((1, 2), bool), axis=1, logits=True, brief=True)
    assert brief.top5 is None and brief.histogram == ()


def test_a_histogram_of_a_large_output_counts_evenly_spread_errors() -> None:
    want = np.ones((1, 1, 1_000_000), np.float32)
    have = want + np.where(np.arange(1_000_000) % 2, 0, 1e-3).astype(np.float32)
    counts = measure(want, have, np.ones((1, 1), bool), axis=1, logits=True).histogram
    assert 100_000 < sum(counts) <= 2**18
    assert counts[0] == pytest.approx(sum(counts) / 2, rel=1e-4)
    assert counts[10] == sum(counts) - counts[0]
