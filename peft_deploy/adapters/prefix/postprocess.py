"""From the encoder's output to the past that one of PaddleNLP's models takes.

Each function takes keys and values [B, P, 2·L, K, D], the keys of all layers before the values of
all layers, and gives L pairs (key, value).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from operator import attrgetter
from typing import Any

import paddle

Past = tuple[tuple[paddle.Tensor, paddle.Tensor], ...]
Postprocess = Callable[[paddle.Tensor], Any]
# Where the letters of a layout stand in the encoder's output; its axis 2 counts the layers.
_AXES = {"B": 0, "S": 1, "K": 3, "D": 4}
_LAYER_AXIS = 2


def arrange_past(past_key_values: paddle.Tensor, layout: str) -> Past:
    """The pairs in a given layout.

    Args:
        past_key_values: [B, P, 2·L, K, D].
        layout: axes of every key and value, a permutation of ``"BSKD"``.
    """
    order = [_LAYER_AXIS, *(_AXES[letter] for letter in layout)]
    layers = paddle.unbind(paddle.transpose(past_key_values, order), axis=0)
    half = len(layers) // 2
    return tuple(zip(layers[:half], layers[half:], strict=True))


def postprocess_for(layout: str, cache_class: str | None = None) -> Postprocess:
    """:func:`arrange_past` for one layout.

    Args:
        layout: axes of every key and value, a permutation of ``"BSKD"``.
        cache_class: ``module:name`` of what wraps each pair.
    """
    if cache_class is None:
        return partial(arrange_past, layout=layout)
    return partial(_arrange_wrapped, layout=layout, wrap=imported(cache_class))


def imported(name: str) -> Any:
    """What a rule calls ``module:name``."""
    module, _, attribute = name.partition(":")
    return attrgetter(attribute)(import_module(module))


def _arrange_wrapped(past_key_values: paddle.Tensor, layout: str, wrap: Any) -> tuple[Any, ...]:
    return tuple(wrap(*pair) for pair in arrange_past(past_key_values, layout))


def llama_postprocess_past_key_value(past_key_values: paddle.Tensor) -> Past:
    """For Llama: L pairs of [B, P, K, D]."""
    return arrange_past(past_key_values, "BSKD")


def qwen_postprocess_past_key_value(past_key_values: paddle.Tensor) -> Past:
    """For Qwen and Qwen2: L pairs of [B, P, K, D]."""
    return arrange_past(past_key_values, "BSKD")


def bloom_postprocess_past_key_value(past_key_values: paddle.Tensor) -> Past:
    """For Bloom: L pairs of [B, P, K, D]."""
    return arrange_past(past_key_values, "BSKD")


def chatglm_postprocess_past_key_value(past_key_values: paddle.Tensor) -> Past:
    """For ChatGLM and ChatGLM2: L pairs of [P, B, K, D]."""
    return arrange_past(past_key_values, "SBKD")


def mistral_postprocess_past_key_value(past_key_values: paddle.Tensor) -> Past:
    """For Mistral: L pairs of [B, K, P, D]."""
    return arrange_past(past_key_values, "BKSD")
