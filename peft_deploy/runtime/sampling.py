"""How the next token is chosen from the logits; pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from peft_deploy.errors import ConfigError, ExecutionError

Logits = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int64]
Probabilities = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The rule by which tokens are drawn.

    Args:
        temperature: divides the logits; 0 takes the most likely token always (greedy).
        top_k: only the k most likely tokens can be drawn, tokens as likely as the k-th included; 0
            means all.
        top_p: only the most likely tokens whose probabilities together reach p can be drawn; 1
            means all.
        seed: makes the draws repeatable; None draws differently each time.

    Raises:
        ConfigError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (np.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; it must be 0 (no limit) or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(
                f"top_p is {self.top_p}; it must be above 0 and at most 1 (no limit)"
            )
        if self.seed is not None and self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it must be 0 or more")

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn at random."""
        return self.temperature == 0

    def generators(self, rows: int) -> list[np.random.Generator]:
        """One source of randomness a row.

        A row's draws depend on the seed and its index alone, so that they do not change with what
        else is in the batch.
        """
        if self.seed is None:
            return [np.random.default_rng() for _ in range(rows)]
        return [np.random.default_rng([self.seed, row]) for row in range(rows)]


def choose(
    logits: Logits, sampling: Sampling, generators: Sequence[np.random.Generator]
) -> Tokens:
    """The next token of each row.

    Args:
        logits: [B, V].
        sampling: the rule.
        generators: one a row; each gives up one number, none when greedy.

    Returns:
        [B] token ids.

    Raises:
        ExecutionError: a row of logits holds NaN, or no finite value.
    """
    _check(logits)
    if sampling.greedy:
        return greedy(logits)
    return draw(probabilities(logits, sampling), generators)


def greedy(logits: Logits) -> Tokens:
    """The most likely token of each row, the lowest id among equals: [B, V] → [B]."""
    tokens: Tokens = np.argmax(logits, axis=-1).astype(np.int64)
    return tokens


def probabilities(logits: Logits, sampling: Sampling) -> Probabilities:
    """What each token is drawn with: temperature first, then top-k, then top-p.

    Args:
        logits: [B, V].
        sampling: the rule, not greedy.

    Returns:
        [B, V], each row adding up to 1; tokens that cannot be drawn have 0.
    """
    if sampling.greedy:
        raise ConfigError("temperature 0 draws nothing at random; there are no probabilities")
    scores = logits.astype(np.float64)  # [B, V]
    scores = (scores - scores.max(axis=-1, keepdims=True)) / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        kth = np.partition(scores, -sampling.top_k, axis=-1)[:, -sampling.top_k, None]  # [B, 1]
        scores = np.where(scores < kth, -np.inf, scores)
    weights = np.exp(scores)
    weights /= weights.sum(axis=-1, keepdims=True)
    if sampling.top_p < 1:
        weights = _nucleus(weights, sampling.top_p)
    return weights


def draw(weights: Probabilities, generators: Sequence[np.random.Generator]) -> Tokens:
    """One token a row.

    Args:
        weights: [B, V] probabilities.
        generators: one a row; each gives up one number.

    Returns:
        [B] token ids, none of them with probability 0.
    """
    tokens = np.empty(len(weights), np.int64)
    for row, (weight, generator) in enumerate(zip(weights, generators, strict=True)):
        possible = np.flatnonzero(weight)
        edges = np.cumsum(weight[possible])  # [n]
        at = np.searchsorted(edges, generator.random() * edges[-1], side="right")
        tokens[row] = possible[min(int(at), len(possible) - 1)]
    return tokens


def _nucleus(weights: Probabilities, top_p: float) -> Probabilities:
    """The smallest set of most likely tokens that together reach ``top_p``, made to add up to 1
    again.
    """
    order = np.argsort(-weights, axis=-1, kind="stable")  # [B, V]
    ranked = np.take_along_axis(weights, order, axis=-1)
    before = np.cumsum(ranked, axis=-1) - ranked  # what the more likely ones have reached
    ranked = np.where(before < top_p, ranked, 0.0)  # the first has 0 before it, so it always stays
    kept = np.zeros_like(weights)
    np.put_along_axis(kept, order, ranked, axis=-1)
    total: Probabilities = kept.sum(axis=-1, keepdims=True)
    return kept / total


def _check(logits: Logits) -> None:
    peaks = logits.max(axis=-1)  # [B]; NaN anywhere in a row makes its maximum NaN
    if not np.isfinite(peaks).all():
        row = int(np.flatnonzero(~np.isfinite(peaks))[0])
        raise ExecutionError(
            f"the logits of row {row} reach {peaks[row]}, so no token can be chosen",
            hint="a half-precision bundle may overflow; peft-deploy validate shows where",
        )
