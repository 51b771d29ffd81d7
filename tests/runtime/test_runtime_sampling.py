from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from peft_deploy.errors import ConfigError, ExecutionError
from peft_deploy.runtime.sampling import Sampling, choose, draw, greedy, probabilities

LOGITS = np.log(np.array([[0.5, 0.25, 0.15, 0.1]], np.float32))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_greedy_takes_the_highest_and_the_first_among_equals() -> None:
    logits = np.array([[1, 3, 2], [5, 5, 0], [-9, -7, -8]], np.float32)
    assert greedy(logits).tolist() == [1, 0, 1]
    sampling = Sampling()
    assert choose(logits, sampling, sampling.generators(3)).tolist() == [1, 0, 1]


def test_temperature_divides_the_logits() -> None:
    for temperature in (0.5, 1.0, 2.0):
        got = probabilities(LOGITS, Sampling(temperature=temperature))
        np.testing.assert_allclose(got, softmax(LOGITS / temperature), rtol=1e-6)


def test_a_temperature_near_zero_neither_overflows_nor_draws_anything_else() -> None:
    got = probabilities(LOGITS * 1000, Sampling(temperature=1e-9))
    np.testing.assert_array_equal(got, [[1, 0, 0, 0]])


@pytest.mark.parametrize(
    ("top_k", "expected"),
    [(1, [1, 0, 0, 0]), (2, [2 / 3, 1 / 3, 0, 0]), (4, None), (0, None), (99, None)],
)
def test_top_k(top_k: int, expected: list[float] | None) -> None:
    got = probabilities(LOGITS, Sampling(temperature=1, top_k=top_k))
    np.testing.assert_allclose(got, [expected] if expected else softmax(LOGITS), rtol=1e-6)


def test_top_k_keeps_all_that_are_as_likely_as_the_kth() -> None:
    logits = np.array([[2.0, 1.0, 1.0, 0.0]], np.float32)
    got = probabilities(logits, Sampling(temperature=1, top_k=2))
    assert (got > 0).tolist() == [[True, True, True, False]]


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.01, 1), (0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.95, 4), (1, 4)]
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p: float, kept: int) -> None:
    got = probabilities(LOGITS, Sampling(temperature=1, top_p=top_p))[0]
    chances = np.exp(LOGITS[0])[:kept]
    np.testing.assert_allclose(got[:kept], chances / chances.sum(), rtol=1e-6)
    assert not got[kept:].any()


def test_top_p_that_is_reached_exactly_needs_no_more_tokens() -> None:
    got = probabilities(np.zeros((1, 4), np.float32), Sampling(temperature=1, top_p=0.5))
    np.testing.assert_array_equal(got, [[0.5, 0.5, 0, 0]])


def test_top_p_comes_after_temperature_and_top_k() -> None:
    # Two tokens left by top-k, 2/3 and 1/3: 0.6 of that is the first alone, 0.6 of the whole would
    # be both.
    got = probabilities(LOGITS, Sampling(temperature=1, top_k=2, top_p=0.6))
    np.testing.assert_allclose(got, [[1, 0, 0, 0]])


def test_rows_do_not_mix() -> None:
    logits = np.stack([LOGITS[0], LOGITS[0][::-1]])
    got = probabilities(logits, Sampling(temperature=0.7, top_k=3, top_p=0.8))
    np.testing.assert_allclose(got[0], got[1][::-1])


def test_draws_follow_the_probabilities() -> None:
    weights = np.exp(LOGITS).repeat(20000, axis=0).astype(np.float64)
    generator = np.random.default_rng(11)
    counts = np.bincount(draw(weights, [generator] * len(weights)), minlength=4) / len(weights)
    # Four standard deviations of a share p among n draws.
    spread = 4 * np.sqrt(weights[0] * (1 - weights[0]) / len(weights))
    assert (np.abs(counts - weights[0]) < spread).all(), counts


@example([0.0, 1.2358398884029598e-19], 1.0, 0, 0.5, 0)
@given(
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=12),
    st.floats(0.05, 5),
    st.integers(0, 14),
    st.floats(0.01, 1),
    st.integers(0, 99),
)
def test_a_draw_is_always_one_of_the_tokens_left(
    row: list[float], temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    logits = np.array([row], np.float32)
    weights = probabilities(logits, sampling)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-9)
    # Logits that differ by less than float64 tells apart after exp are equally likely; one of them stays.
    likeliest = logits[0] >= logits[0].max() - 1e-6
    assert weights[0][likeliest].max() > 0
    token = choose(logits, sampling, sampling.generators(1))[0]
    assert weights[0][token] > 0


def test_a_seed_repeats_and_a_row_draws_the_same_in_any_batch() -> None:
    logits = np.zeros((3, 1000), np.float32)
    sampling = Sampling(temperature=1, seed=5)

    def tokens(rows: int, how: Sampling) -> np.ndarray:
        generators = how.generators(rows)
        return np.stack([choose(logits[:rows], how, generators) for _ in range(6)], axis=1)

    first = tokens(3, sampling)
    np.testing.assert_array_equal(first, tokens(3, sampling))
    np.testing.assert_array_equal(first[:1], tokens(1, sampling))
    assert len({tuple(row) for row in first.tolist()}) == 3
    assert (first != tokens(3, Sampling(temperature=1, seed=6))).any()
    free = Sampling(temperature=1)
    assert (tokens(3, free) != tokens(3, free)).any()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"seed": -3}, "seed is -3"),
    ],
)
def test_options_out_of_range(option: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**option)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_are_an_error(bad: float, temperature: float) -> None:
    logits = np.zeros((2, 5), np.float32)
    logits[1, 3] = bad
    sampling = Sampling(temperature=temperature)
    with pytest.raises(ExecutionError, match="logits of row 1 reach"):
        choose(logits, sampling, sampling.generators(2))


def test_minus_infinity_is_a_token_that_cannot_be_drawn() -> None:
    logits = np.array([[-np.inf, 1.0, -np.inf, 1.0]], np.float32)
    got = probabilities(logits, Sampling(temperature=1, top_p=0.9))
    np.testing.assert_allclose(got, [[0, 0.5, 0, 0.5]])
