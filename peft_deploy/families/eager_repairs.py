"""What single models of PaddleNLP need in order to compute what they are given. Needs Paddle.

Some of them count places in the cache where they mean tokens, take no positions, or misread their own cache. Each
function here puts one such thing right for the time of a call; what is handed out are the model's own numbers, and
a plain text without padding and cache gives bit for bit what it gives without (a test sees to that).
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import paddle
from paddle import Tensor, nn

from peft_deploy.errors import ExecutionError
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
    """PaddleNLP's RW on a bundle's inputs; see :func:`call_with_flat_cache` for what is put right.

    Args:
        model: PaddleNLP's, or a LoRA model around it.
        feeds: the signature's inputs by name.
        signature: of the graph.
    """
    output = _call_flat(
        model,
        {INPUT_IDS: feeds[INPUT_IDS], ATTENTION_MASK: feeds[ATTENTION_MASK], "use_cache": True},
        past_pairs(feeds, signature, _FLAT_LAYOUT),
        feeds.get(POSITION_IDS),
    )
    return decoder_outputs(model, output.to_tuple(), signature, _FLAT_LAYOUT)


def call_with_flat_cache(
    model: nn.Layer, arguments: Mapping[str, Any], num_prefix_tokens: int
) -> Any:
    """PaddleNLP's RW behind a prefix.

    Its class keeps the cache as [B * K, T, D], rotates new tokens from position 0 on whatever the cache holds, and
    takes the head size for the cache's length when it makes the mask. ALiBi fails with a mask of integers on Paddle
    3. Here the cache is [B, K, T, D] on both sides, the mask of any type, and tokens are rotated at their positions.

    Args:
        model: PaddleNLP's, or a LoRA model around it.
        arguments: of its ``forward``. ``past_key_values`` holds L pairs of [B, K, P + n, D], the prefix first;
            ``attention_mask`` is [B, P + n + S]; ``position_ids`` [B, S] say where tokens are rotated. Left out, they
            count the tokens that the mask keeps, from 0 behind the prefix. ALiBi counts in the mask, the prefix too,
            so that both kinds see the same distances whatever the padding.
        num_prefix_tokens: P.

    Returns:
        What its ``forward`` returns, a tuple or an object.

    Raises:
        ExecutionError: the model has other layers than it runs.
    """
    given = dict(arguments)
    past, positions = given.pop("past_key_values"), given.pop(POSITION_IDS, None)
    tokens = given[INPUT_IDS] if given.get(INPUT_IDS) is not None else given["inputs_embeds"]
    batch, new = tokens.shape[:2]
    mask = given.get(ATTENTION_MASK)
    if mask is None:
        mask = paddle.ones([batch, past[0][0].shape[2] + new], dtype="int64")
    if positions is None:
        kept = mask[:, num_prefix_tokens:].astype("int64")  # [B, n + S]
        positions = (kept.cumsum(-1) - 1).clip(min=0)[:, -new:]
    as_object = given.pop("return_dict", None)
    output = _call_flat(model, {**given, ATTENTION_MASK: mask}, past, positions)
    if as_object is None:
        as_object = model.config.use_return_dict
    return output if as_object else output.to_tuple()


def _call_flat(
    model: nn.Layer, arguments: Mapping[str, Any], past: Any, positions: Tensor | None
) -> Any:
    """What RW returns as an object, its cache [B, K, T, D].

    Args:
        model: see :func:`call_with_flat_cache`.
        arguments: of its ``forward``, the mask [B, P + S] among them.
        past: L pairs of [B, K, P, D]; None for an empty cache.
        positions: [B, S]; None where tokens are not rotated, or from 0 on.

    Raises:
        ExecutionError: the model has other layers than it runs.
    """
    mask, flat, seen = arguments[ATTENTION_MASK], None, 0
    if past is not None:
        seen = past[0][0].shape[2]
        flat = [tuple(t.reshape([-1, *t.shape[2:]]) for t in pair) for pair in past]
    twin = _twin(model, {})
    made = _make_masks_for(twin, seen)
    if positions is not None:
        _rotate_at(twin, positions)
    output: Any = twin(
        **{**arguments, ATTENTION_MASK: mask.astype("float32")},
        past_key_values=flat,
        return_dict=True,
    )
    if not made:
        raise ExecutionError(
            f"{type(model).__name__} runs other layers than those it names as its own, so that what PaddleNLP's "
            "class gets wrong behind a cache cannot be put right",
            hint="give PaddleNLP's model, or a LoRAModel around it",
        )
    if output.past_key_values is not None:
        output.past_key_values = tuple(
            tuple(t.reshape([mask.shape[0], -1, *t.shape[1:]]) for t in pair)
            for pair in output.past_key_values
        )
    return output


def _twin(layer: nn.Layer, twins: dict[int, nn.Layer]) -> nn.Layer:
    """A model of the same parameters and hooks whose layers can be changed: other threads use the model.

    Args:
        layer: the model.
        twins: gets the twin of every layer, by the layer's id.
    """
    twin = twins[id(layer)] = copy.copy(layer)
    # Tables that a layer keeps are buffers; their length is an attribute, which has to stay with them.
    twin._buffers = copy.copy(layer._buffers)
    twin._sub_layers = OrderedDict(
        (name, None if sub is None else _twin(sub, twins))
        for name, sub in layer._sub_layers.items()
    )
    for name, value in list(vars(twin).items()):
        # A LoRA model's forward is its model's.
        if isinstance(value, MethodType) and id(value.__self__) in twins:
            vars(twin)[name] = MethodType(value.__func__, twins[id(value.__self__)])
    return twin


def _make_masks_for(model: nn.Layer, past: int) -> list[int]:
    """Masks are made for ``past`` tokens in the cache; gives the lengths of those made so far."""
    made: list[int] = []
    owner = next(
        layer
        for layer in model.sublayers(include_self=True)
        if hasattr(type(layer), "_prepare_attn_mask")
    )
    prepare = owner._prepare_attn_mask

    def corrected(mask: Tensor, *, input_shape: tuple[int, int], **_: int) -> Tensor:
        made.append(past + input_shape[1])
        return prepare(mask, input_shape=input_shape, past_key_values_length=past)

    owner._prepare_attn_mask = corrected
    return made


def _rotate_at(model: nn.Layer, position_ids: Tensor) -> None:
    """Rotary layers look positions [B, S] up in their table; ALiBi models have no such layers."""
    for layer in model.sublayers():
        if hasattr(type(layer), "cos_sin"):
            layer.forward = _rotation(layer, position_ids)


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
