"""What single models of PaddleNLP need in order to compute what they are given. Needs Paddle.

Some of them count places in the cache where they mean tokens, take no positions, or misread their own cache. Each
function here puts one such thing right for the time of a call; what is handed out are the model's own numbers, and
a plain text without padding and cache gives bit for bit what it gives without (a test sees to that).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import paddle
from paddle import Tensor, nn

from peft_deploy.families.eager import decoder_outputs, past_pairs
from peft_deploy.signature import ATTENTION_MASK, INPUT_IDS, POSITION_IDS, GraphSignature

_FLAT_LAYOUT = "BKSD"  # of a cache that is only flattened, [B * K, S, D]


@contextmanager
def logn_by_tokens(model: nn.Layer, feeds: Mapping[str, Tensor]) -> Iterator[None]:
    """Lets Qwen's log-n factor follow the number of real tokens, where it counts padding among them.

    Args:
        model: PaddleNLP's Qwen, or a LoRA model around it.
        feeds: with the mask [B, T].
    """
    counts = (feeds[ATTENTION_MASK].cumsum(-1) - 1).clip(min=0)  # [B, T]
    layers = [layer for layer in model.sublayers() if getattr(layer, "use_logn_attn", False)]
    tables = [layer.logn_tensor for layer in layers]  # [1, lengths, 1, 1]
    for layer, table in zip(layers, tables, strict=True):
        layer.logn_tensor = table[0][counts]  # [B, T, 1, 1]
    try:
        yield
    finally:
        for layer, table in zip(layers, tables, strict=True):
            layer.logn_tensor = table


@contextmanager
def computing_in_own_dtype(model: nn.Layer) -> Iterator[None]:
    """Lets ChatGLM's attention compute in the type of its weights, where it remembers that of its construction.

    Args:
        model: PaddleNLP's ChatGLM2, or a LoRA model around it.
    """
    dtype = str(next(iter(model.parameters())).dtype).rpartition(".")[2]
    remembered = {
        layer: layer.default_dtype
        for layer in model.sublayers()
        if hasattr(layer, "default_dtype")
    }
    for layer in remembered:
        layer.default_dtype = dtype
    try:
        yield
    finally:
        for layer, before in remembered.items():
            layer.default_dtype = before


def run_with_flat_cache(
    model: nn.Layer, feeds: Mapping[str, Tensor], signature: GraphSignature
) -> dict[str, Tensor]:
    """PaddleNLP's RW, whose cache is [B * K, S, D].

    Its class rotates new tokens from position 0 on, whatever the cache holds, and takes the head size for the
    cache's length when it makes the mask; both are put right here. ALiBi is given the mask in float32, as the class
    makes it itself when there is none: with integers it fails on Paddle 3.

    Args:
        model: PaddleNLP's, or a LoRA model around it.
        feeds: the signature's inputs by name.
        signature: of the graph.
    """
    batch, new = feeds[INPUT_IDS].shape
    pairs = past_pairs(feeds, signature, _FLAT_LAYOUT)
    flat = None
    if pairs is not None:
        flat = [tuple(t.reshape([-1, *t.shape[2:]]) for t in pair) for pair in pairs]
    past = feeds[ATTENTION_MASK].shape[1] - new
    with _mask_of_length(model, past), _rotated_at(model, feeds.get(POSITION_IDS)):
        returned: Any = model(
            input_ids=feeds[INPUT_IDS],
            attention_mask=feeds[ATTENTION_MASK].astype("float32"),
            past_key_values=flat,
            use_cache=True,
            return_dict=False,
        )
    cache = [[t.reshape([batch, -1, *t.shape[1:]]) for t in pair] for pair in returned[1]]
    return decoder_outputs(model, (returned[0], cache), signature, _FLAT_LAYOUT)


@contextmanager
def _mask_of_length(model: nn.Layer, past: int) -> Iterator[None]:
    """Masks are made for ``past`` tokens in the cache."""
    owner = next(
        layer
        for layer in model.sublayers(include_self=True)
        if hasattr(type(layer), "_prepare_attn_mask")
    )
    prepare = owner._prepare_attn_mask

    def corrected(mask: Tensor, *, input_shape: tuple[int, int], **_: int) -> Tensor:
        return prepare(mask, input_shape=input_shape, past_key_values_length=past)

    owner._prepare_attn_mask = corrected
    try:
        yield
    finally:
        del owner._prepare_attn_mask


@contextmanager
def _rotated_at(model: nn.Layer, position_ids: Tensor | None) -> Iterator[None]:
    """Rotary layers look positions [B, S] up in their table; ALiBi models have none, and no such layers."""
    layers = [layer for layer in model.sublayers() if hasattr(type(layer), "cos_sin")]
    for layer in layers if position_ids is not None else []:
        layer.forward = _rotation(layer, position_ids)
    try:
        yield
    finally:
        for layer in layers if position_ids is not None else []:
            del layer.forward


def _rotation(rotary: nn.Layer, position_ids: Any) -> Any:
    from paddlenlp.transformers.rw.modeling import rotate_half

    length = int(position_ids.max()) + 1

    def rotate(x: Tensor) -> Tensor:
        tables = rotary.cos_sin(length, x.dtype)  # [1, positions, D] each
        heads = x.shape[0] // position_ids.shape[0]
        cos, sin = (
            paddle.repeat_interleave(table[0][position_ids], heads, axis=0) for table in tables
        )
        return (x * cos) + (rotate_half(x) * sin)

    return lambda q, k: (rotate(q), rotate(k))
