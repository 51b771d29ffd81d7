"""Greedy tokens out of an unmodified onnxruntime-genai."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

needs_genai = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="onnxruntime-genai 0.18 needs Python 3.11"
)


class Genai:
    """A bundle in onnxruntime-genai.

    Args:
        bundle: its folder, as it is.
    """

    def __init__(self, bundle: Path) -> None:
        import onnxruntime_genai as og

        self._og = og
        self._bundle = bundle
        self._model = og.Model(str(bundle))
        self._adapters = og.Adapters(self._model)
        config = json.loads((bundle / "genai_config.json").read_text("utf-8"))["model"]
        self._pad, self.ends = config["pad_token_id"], tuple(config.get("eos_token_id", ()))

    def load(self, path: Path) -> None:
        """An ``.onnx_adapter`` file, by the name of the file."""
        self._adapters.load(str(path), path.stem)

    def tokens(
        self,
        prompts: Sequence[Sequence[int]],
        steps: int,
        adapter: str | Sequence[str] = (),
        inputs: Mapping[str, np.ndarray] | None = None,
    ) -> list[list[int]]:
        """New tokens of each prompt, in one batch padded on the right; end tokens are left out.

        ``inputs`` are further ones of the graph.
        """
        width = max(map(len, prompts))
        ids = [[*prompt, *[self._pad] * (width - len(prompt))] for prompt in prompts]
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(
            max_length=width + steps, batch_size=len(prompts), do_sample=False
        )
        generator = self._og.Generator(self._model, params)
        for name in [adapter] if isinstance(adapter, str) else adapter:
            generator.set_active_adapter(self._adapters, name)
        for name, array in (inputs or {}).items():
            generator.set_model_input(name, array)
        generator.append_tokens(np.array(ids, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        rows = [generator.get_sequence(i)[width:] for i in range(len(prompts))]
        return [without_end([int(t) for t in row], self.ends, self._pad) for row in rows]


def without_end(tokens: Sequence[int], ends: Sequence[int], pad: int | None = None) -> list[int]:
    """What comes before the first end token; genai leaves that out, and fills ended rows up."""
    kept: list[int] = []
    for token in tokens:
        if token in ends or (pad is not None and token == pad and _only(tokens[len(kept) :], pad)):
            break
        kept.append(token)
    return kept


def _only(tokens: Sequence[int], token: int) -> bool:
    return all(other == token for other in tokens)


def ours(session: Any, prompts: Any, steps: int, ends: Sequence[int], **given: Any) -> list[Any]:
    """The same from this package's session."""
    from peft_deploy.runtime import GenerationOptions

    options = GenerationOptions(max_new_tokens=steps, stop_ids=tuple(ends))
    results = session.generate(prompts, options, **given)
    return [without_end(result.token_ids, ends) for result in results]
