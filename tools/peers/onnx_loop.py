"""Greedy decoding of any decoder graph under plain onnxruntime: the same loop for every exporter's.

The cache stays in onnxruntime's own values and is never copied. A graph whose cache is one buffer of fixed length
(GroupQueryAttention with ``past_present_share_buffer``) gets that: it is bound once, as input and as output.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass
class _State:
    """One generation: its binding, with adapter and shared buffer bound, its cache, and how far it is."""

    binding: Any
    cache: Sequence[Any]
    length: int = 0
    token: int = -1


class OnnxLoop:
    """One graph, in one or several variants.

    Args:
        folder: with ``model.onnx``; a ``genai_config.json`` in it says whether the cache is a shared buffer.
        threads: within an operator.
        adapters: name of a variant → an ``.onnx_adapter`` file that is active in it.
        most: tokens of the longest generation, prompt included.
    """

    def __init__(
        self, folder: Path, threads: int, adapters: Mapping[str, Path], most: int
    ) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        self._session = ort.InferenceSession(
            folder / "model.onnx", options, providers=["CPUExecutionProvider"]
        )
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._inputs = {node.name: node for node in self._session.get_inputs()}
        self._past = [name for name in self._inputs if name.startswith("past_key_values")]
        self._present = [
            name.replace("past_key_values", "present", 1) for name in self._past
        ]  # every exporter calls them so
        config = _genai_config(folder)
        shared = config.get("search", {}).get("past_present_share_buffer", False)
        self._buffer = most if shared else 0
        # onnxruntime-genai's builder leaves this open in the graph.
        self._head_size = config.get("model", {}).get("decoder", {}).get("head_size")
        self._adapters = {
            name: ort.AdapterFormat.read_adapter(str(path)).get_parameters()
            for name, path in adapters.items()
        }
        self._states: dict[str, _State] = {}

    def start(self, variant: str, prompt: Sequence[int]) -> int:
        """Reads the prompt with an empty cache; gives the first new token."""
        binding, cache = self._session.io_binding(), self._empty_cache()
        for name, value in self._adapters.get(variant, {}).items():
            binding.bind_ortvalue_input(name, value)
        if self._buffer:
            for past, present, value in zip(self._past, self._present, cache, strict=True):
                binding.bind_ortvalue_input(past, value)
                binding.bind_ortvalue_output(present, value)
        self._states[variant] = _State(binding, cache)
        return self._step(self._states[variant], prompt)

    def decode(self, variant: str) -> int:
        """One more token."""
        state = self._states[variant]
        return self._step(state, [state.token])

    def _step(self, state: _State, tokens: Sequence[int]) -> int:
        first, state.length = state.length, state.length + len(tokens)
        feeds = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, state.length), np.int64),
            "position_ids": np.arange(first, state.length, dtype=np.int64)[None],
        }
        values = {n: ort.OrtValue.ortvalue_from_numpy(a) for n, a in feeds.items()}
        for name, value in values.items():
            if name in self._inputs:
                state.binding.bind_ortvalue_input(name, value)
        if not self._buffer:
            for name, value in zip(self._past, state.cache, strict=True):
                state.binding.bind_ortvalue_input(name, value)
            for name in self._present:
                state.binding.bind_output(name, "cpu")
        state.binding.bind_output("logits", "cpu")
        self._session.run_with_iobinding(state.binding)
        # In the order in which they were bound first.
        *present, logits = state.binding.get_outputs()
        state.cache = present
        state.token = int(logits.numpy()[0, -1].argmax())
        return state.token

    def _empty_cache(self) -> list[Any]:
        values = []
        for name in self._past:
            node = self._inputs[name]
            _, heads, _, size = node.shape
            size = size if isinstance(size, int) else self._head_size
            shape = (1, heads, self._buffer, size)
            values.append(ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, DTYPES[node.type])))
        return values


def _genai_config(folder: Path) -> dict[str, Any]:
    path = folder / "genai_config.json"
    config: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return config
