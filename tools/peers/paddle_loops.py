"""The same greedy decoding in Paddle: PaddleNLP's model, eagerly, and a static program under Paddle Inference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peft_deploy.environment import require_paddle


class EagerLoop:
    """PaddleNLP's own model with its cache, as its ``generate`` calls it.

    Args:
        folder: a checkpoint.
        threads: for Paddle's and MKL's kernels.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        require_paddle("the comparison")
        import paddle

        from peft_deploy.base import open_base
        from peft_deploy.base.dygraph import load_model

        paddle.set_grad_enabled(False)
        paddle.base.core.set_num_threads(threads)
        self._paddle, self._model = paddle, load_model(open_base(folder))
        self._cache: Any = None
        self._length, self._token = 0, -1

    def start(self, variant: str, prompt: Sequence[int]) -> int:
        """Reads the prompt with an empty cache; gives the first new token."""
        self._cache, self._length = None, 0
        return self._step(prompt)

    def decode(self, variant: str) -> int:
        """One more token."""
        return self._step([self._token])

    def _step(self, tokens: Sequence[int]) -> int:
        first, self._length = self._length, self._length + len(tokens)
        logits, self._cache = self._model(
            input_ids=self._paddle.to_tensor([tokens]),
            attention_mask=self._paddle.ones([1, self._length], "int64"),
            position_ids=self._paddle.arange(first, self._length).unsqueeze(0),
            past_key_values=self._cache,
            use_cache=True,
            return_dict=False,
        )[:2]
        self._token = int(logits[0, -1].argmax())
        return self._token


class InferenceLoop:
    """A bundle in Paddle's static format, through the product's runner.

    Args:
        folder: the bundle.
        threads: for Paddle's and MKL's kernels.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        from peft_deploy.runtime import caching, initial_cache
        from peft_deploy.runtime.opening import open_runner

        self._runner = caching(open_runner(folder, threads=threads))
        self._empty = initial_cache(self._runner.signature, 1)
        self._cache: Any = None
        self._token = -1

    def start(self, variant: str, prompt: Sequence[int]) -> int:
        """Reads the prompt with an empty cache; gives the first new token."""
        self._cache = self._runner.load_cache(self._empty)
        return self._step(prompt)

    def decode(self, variant: str) -> int:
        """One more token."""
        return self._step([self._token])

    def _step(self, tokens: Sequence[int]) -> int:
        first, total = self._cache.length, self._cache.length + len(tokens)
        feeds = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(first, total, dtype=np.int64)[None],
        }
        logits, self._cache = self._runner.step(feeds, self._cache)
        self._token = int(logits[0, -1].argmax())
        return self._token
