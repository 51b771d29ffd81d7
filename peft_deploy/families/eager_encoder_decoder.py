"""PaddleNLP's T5 in the dynamic graph, called with a bundle's inputs. Needs Paddle.

What is called is PaddleNLP's code with every row alone and without its padding: its positions are counted in slots, so
that a gap of padding between two tokens would move them apart. Only its norms are replaced, see
:func:`_norms_in_own_dtype`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import paddle
from paddle import Tensor, nn

from peft_deploy.errors import ExecutionError
from peft_deploy.families.standins.layers import rms_norm
from peft_deploy.signature import (
    ATTENTION_MASK,
    ENCODER_ATTENTION_MASK,
    ENCODER_INPUT_IDS,
    INPUT_IDS,
    LOGITS,
    GraphSignature,
    cross_names,
    present_names,
)

_WHOLE = (paddle.float32, paddle.float64)
Caches = list[tuple[Tensor, ...]]  # a layer's own keys and values, and those of the source


def run_encoder(
    model: nn.Layer, feeds: Mapping[str, Tensor], signature: GraphSignature
) -> dict[str, Tensor]:
    """The keys and values of source texts, zeros where there is padding.

    Args:
        model: PaddleNLP's, or a LoRA model around it.
        feeds: the encoder's inputs by name.
        signature: of the encoder.
    """
    rows = []
    with _norms_in_own_dtype(model):
        for ids, mask in zip(feeds[INPUT_IDS], feeds[ATTENTION_MASK], strict=True):
            places = _places(mask)
            cross = [part[0] for cache in _read(model, ids[places])[1] for part in cache]
            rows.append([_spread(part, places, len(mask), axis=1) for part in cross])
    stacked = [paddle.stack(list(parts)) for parts in zip(*rows, strict=True)]
    return dict(zip(cross_names(len(signature.outputs) // 2), stacked, strict=True))


def run_both(
    model: nn.Layer, feeds: Mapping[str, Tensor], signature: GraphSignature
) -> dict[str, Tensor]:
    """Logits and cache of a decoder's new tokens, zeros where there is padding.

    Args:
        model: PaddleNLP's, or a LoRA model around it.
        feeds: the inputs of encoder and decoder by name.
        signature: of both together.
    """
    names = [LOGITS, *present_names(signature.num_layers)]
    with _norms_in_own_dtype(model):
        rows = [_run_row(model, feeds, signature, b) for b in range(feeds[INPUT_IDS].shape[0])]
    stacked = [paddle.stack(list(parts)) for parts in zip(*rows, strict=True)]
    return dict(zip(names, stacked, strict=True))


def _run_row(
    model: nn.Layer, feeds: Mapping[str, Tensor], signature: GraphSignature, row: int
) -> list[Tensor]:
    """Logits [S, V] and the cache [H, T, D] of one row."""
    new, total = feeds[INPUT_IDS].shape[1], feeds[ATTENTION_MASK].shape[1]
    old = total - new
    mask = feeds[ATTENTION_MASK][row]
    places, fresh = _places(mask), _places(mask[old:])
    past = [feeds[spec.name][row][:, :old] for spec in signature.past]
    source = feeds[ENCODER_INPUT_IDS][row][_places(feeds[ENCODER_ATTENTION_MASK][row])]
    if fresh.shape[0] == 0:
        logits = paddle.zeros([new, _vocabulary(signature)], past[0].dtype)
        room = [paddle.zeros([p.shape[0], new, p.shape[2]], p.dtype) for p in past]
        return [logits, *(paddle.concat([p, r], 1) for p, r in zip(past, room, strict=True))]
    hidden, cross = _read(model, source)
    caches: Caches | None = None
    kept = places[: places.shape[0] - fresh.shape[0]]
    if kept.shape[0]:
        own = [paddle.index_select(part, kept, axis=1).unsqueeze(0) for part in past]
        pairs = zip(own[::2], own[1::2], cross, strict=True)
        caches = [(key, value, *both) for key, value, both in pairs]
    ids = feeds[INPUT_IDS][row][fresh].unsqueeze(0)
    logits, grown = _write(model, hidden, ids, caches)
    flat = [part[0] for cache in grown for part in cache[:2]]
    return [
        _spread(logits[0], fresh, new, axis=0),
        *(_spread(part, places, total, axis=1) for part in flat),
    ]


def _read(model: nn.Layer, source: Tensor) -> tuple[Tensor, Caches]:
    """The encoder's hidden states [1, N, E] of a source text [N], and its keys and values in every decoder layer."""
    start = paddle.zeros([1, 1], dtype="int64")  # any token: they do not depend on it
    ids = source.unsqueeze(0)
    returned = model(input_ids=ids, decoder_input_ids=start, use_cache=True, return_dict=False)
    _check(model, returned)
    return returned[2], [cache[2:] for cache in returned[1]]


def _write(
    model: nn.Layer, hidden: Tensor, ids: Tensor, caches: Caches | None
) -> tuple[Tensor, Caches]:
    """Logits and caches of the tokens ids [1, S]."""
    returned = model(
        encoder_output=(hidden,),
        # Embedded, because of ids it would take the last one alone where there is a cache.
        decoder_inputs_embeds=model.t5.shared(ids),
        cache=caches,
        use_cache=True,
        return_dict=False,
    )
    _check(model, returned)
    return returned[0], list(returned[1])


def _check(model: nn.Layer, returned: Any) -> None:
    if not isinstance(returned, tuple) or len(returned) < 3 or len(returned[1][0]) != 4:
        raise ExecutionError(
            f"{type(model).__name__} does not return logits, four caches a layer and the encoder's states"
        )


def _places(mask: Tensor) -> Tensor:
    """Where the tokens of a row stand, [N]."""
    return paddle.nonzero(mask).flatten()


def _spread(values: Tensor, places: Tensor, length: int, axis: int) -> Tensor:
    """The values at their places along an axis of ``length``, zeros elsewhere."""
    shape = list(values.shape)
    shape[axis] = length
    rest = [i for i in range(len(shape)) if i != axis]
    empty = paddle.zeros([length, *(shape[i] for i in rest)], values.dtype)
    filled = paddle.scatter(empty, places, values.transpose([axis, *rest]))
    return filled.transpose([rest.index(i) + 1 if i != axis else 0 for i in range(len(shape))])


def _vocabulary(signature: GraphSignature) -> int:
    return int(next(spec.dims[-1] for spec in signature.outputs if spec.name == LOGITS))


@contextmanager
def _norms_in_own_dtype(model: nn.Layer) -> Iterator[None]:
    """Lets the norms of float32 and float64 models compute in that type.

    PaddleNLP's compute in float32, a float64 model's too. And they round to float16 wherever Paddle's module of
    mixed precision has a state, on or off: ``paddle.amp.auto_cast(enable=False)`` is one, and a guard that failed
    leaves its own behind for the rest of the process.
    """
    norms = [
        layer
        for layer in model.sublayers()
        if hasattr(layer, "variance_epsilon") and layer.weight.dtype in _WHOLE
    ]
    for layer in norms:
        layer.forward = partial(_rms_norm, layer)
    try:
        yield
    finally:
        for layer in norms:
            del layer.forward


def _rms_norm(layer: nn.Layer, x: Tensor) -> Tensor:
    return rms_norm(x, layer.weight, layer.variance_epsilon)
