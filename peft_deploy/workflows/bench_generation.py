"""One generation whose steps are timed."""

from __future__ import annotations

from typing import Any

import numpy as np

from peft_deploy.runtime import CachingRunner, caching, initial_cache
from peft_deploy.runtime.runner import Array
from peft_deploy.signature import ATTENTION_MASK, INPUT_IDS, POSITION_IDS


class RandomGeneration:
    """A generation of random tokens: which ones are fed does not matter to the speed, how many does.

    Args:
        runner: computes the steps.
        batch: rows B.
        length: tokens of each row's prompt.
    """

    def __init__(self, runner: Any, batch: int, length: int) -> None:
        self._runner: CachingRunner = caching(runner)
        signature = self._runner.signature
        self._names = set(signature.input_names)
        self._batch, self._length, self._total = batch, length, 0
        self._rng = np.random.default_rng(0)
        self._cache = self._runner.load_cache(initial_cache(signature, batch))

    def prefill(self) -> None:
        """Reads the prompt."""
        self._step(self._length)

    def decode(self) -> None:
        """One new token a row."""
        self._step(1)

    def _step(self, new: int) -> None:
        first, self._total = self._total, self._total + new
        places = np.arange(first, self._total, dtype=np.int64)
        feeds: dict[str, Array] = {
            INPUT_IDS: self._rng.integers(0, self._vocab, (self._batch, new), dtype=np.int64),
            ATTENTION_MASK: np.ones((self._batch, self._total), np.int64),
            POSITION_IDS: np.tile(places, (self._batch, 1)),
        }
        feeds = {name: array for name, array in feeds.items() if name in self._names}
        _, self._cache = self._runner.step(feeds, self._cache)

    @property
    def _vocab(self) -> int:
        size = self._runner.signature.outputs[0].dims[-1]
        assert isinstance(size, int)
        return size
