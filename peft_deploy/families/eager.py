"""PaddleNLP's own forward, called with a bundle's inputs. Needs Paddle.

The other side of every stand-in: what is called here is PaddleNLP's code, untouched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from paddle import Tensor, nn
from paddle.nn import functional as F

from peft_deploy.errors import ExecutionError
from peft_deploy.signature import (
    ATTENTION_MASK,
    INPUT_IDS,
    LOGITS,
    POSITION_IDS,
    GraphSignature,
    present_names,
)

BUNDLE_LAYOUT = "BKSD"
Pair = Callable[[Tensor, Tensor], Any]
_TABLE_LENGTHS = ("seq_len", "max_seq_len")  # what rotary layers call the length of their table


def run_decoder(
    model: nn.Layer,
    feeds: Mapping[str, Tensor],
    signature: GraphSignature,
    past_layout: str,
    past_argument: str = "past_key_values",
    pair: Pair | None = None,
) -> dict[str, Tensor]:
    """A causal language model that takes the cache as a list of pairs, and position_ids if the graph does.

    Args:
        model: PaddleNLP's, or a LoRA model around it.
        feeds: the signature's inputs by name.
        signature: of the graph.
        past_layout: axes of PaddleNLP's cache, a permutation of ``"BSKD"``.
        past_argument: what its forward calls the cache.
        pair: makes one layer's cache from key and value; a tuple when None.

    Raises:
        ExecutionError: the model returns something else than logits and a cache.
    """
    pairs = past_pairs(feeds, signature, past_layout)
    past = {past_argument: pairs and [pair(*both) if pair else both for both in pairs]}
    positions = {POSITION_IDS: feeds[POSITION_IDS]} if POSITION_IDS in feeds else {}
    length = int(feeds[POSITION_IDS].max()) + 1 if positions else 0
    with _table_up_to(model, length, feeds[ATTENTION_MASK].shape[1]):
        returned = model(
            input_ids=feeds[INPUT_IDS],
            attention_mask=feeds[ATTENTION_MASK],
            **positions,
            **past,
            use_cache=True,
            return_dict=False,
        )
    return decoder_outputs(model, returned, signature, past_layout)


def past_pairs(
    feeds: Mapping[str, Tensor], signature: GraphSignature, past_layout: str
) -> list[tuple[Tensor, Tensor]] | None:
    """The cache in PaddleNLP's layout, key and value a layer; None for an empty one, which its mask code wants."""
    order = [BUNDLE_LAYOUT.index(axis) for axis in past_layout]
    names = [spec.name for spec in signature.past]
    if feeds[names[0]].shape[2] == 0:
        return None
    tensors = [feeds[name].transpose(order).contiguous() for name in names]
    return list(zip(tensors[::2], tensors[1::2], strict=True))


def decoder_outputs(
    model: nn.Layer, returned: Any, signature: GraphSignature, past_layout: str
) -> dict[str, Tensor]:
    """Logits and cache as the signature names them, from what PaddleNLP's forward returned.

    Raises:
        ExecutionError: that is something else than (logits, cache of every layer, …).
    """
    layers = signature.num_layers
    if not isinstance(returned, tuple) or len(returned) < 2 or len(returned[1]) != layers:
        raise ExecutionError(
            f"{type(model).__name__} does not return logits and the cache of {layers} layers"
        )
    order = [past_layout.index(axis) for axis in BUNDLE_LAYOUT]
    flat = [tensor.transpose(order) for cache in returned[1] for tensor in cache]
    return {LOGITS: returned[0], **dict(zip(present_names(layers), flat, strict=True))}


@contextmanager
def rows_given(table: nn.Layer, rows: Tensor) -> Iterator[None]:
    """Lets an embedding look up these rows instead of those that it is called with.

    For models that count positions themselves: their own table, at the positions that the graph is given.

    Args:
        table: the embedding.
        rows: [B, S].
    """
    table.forward = lambda *_args, **_kwargs: F.embedding(rows, table.weight)
    try:
        yield
    finally:
        del table.forward


@contextmanager
def _table_up_to(model: nn.Layer, length: int, total: int) -> Iterator[None]:
    """Lets rotary layers hand out their table for ``length`` positions.

    PaddleNLP cuts the table at the number of tokens in mask and cache, although it
    then looks positions up in it, so that a few tokens at high positions would read past its end.
    What is handed out here are the same layer's own numbers, only more of them.
    """
    changed: list[nn.Layer] = []
    if length > total:
        for layer in model.sublayers():
            is_leaf = next(layer.children(), None) is None
            arguments = inspect.signature(layer.forward).parameters
            if is_leaf and (asked := [name for name in _TABLE_LENGTHS if name in arguments]):
                layer.forward = _longer(layer.forward, asked[0], length)
                changed.append(layer)
    try:
        yield
    finally:
        for layer in changed:
            del layer.forward


@contextmanager
def frequencies_in_float32(model: nn.Layer) -> Iterator[None]:
    """Lets rotary layers that compute their angles in every call do so in float32, in a float64 model too.

    PaddleNLP's Gemma multiplies float32 positions by frequencies that were converted with the model, which Paddle
    refuses. The frequencies come from float32, so the numbers are the same.
    """
    layers = [layer for layer in model.sublayers() if hasattr(layer, "inv_freq")]
    converted = [layer.inv_freq for layer in layers]
    for layer, frequencies in zip(layers, converted, strict=True):
        layer.inv_freq = frequencies.astype("float32")
    try:
        yield
    finally:
        for layer, frequencies in zip(layers, converted, strict=True):
            layer.inv_freq = frequencies


def _longer(forward: Callable[..., Any], argument: str, length: int) -> Callable[..., Any]:
    signature = inspect.signature(forward)

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        if bound.arguments.get(argument) is not None:
            bound.arguments[argument] = max(bound.arguments[argument], length)
        return forward(*bound.args, **bound.kwargs)

    return call
