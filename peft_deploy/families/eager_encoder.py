"""PaddleNLP's encoders in the dynamic graph, called with a bundle's inputs. Needs Paddle.

What is called is PaddleNLP's code, untouched; only rows that begin with padding are turned so that it stands at
their end, where PaddleNLP expects it, and their outputs are turned back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import paddle
from paddle import Tensor, nn

from peft_deploy.errors import ExecutionError
from peft_deploy.families.pooling import Pooling
from peft_deploy.signature import (
    ATTENTION_MASK,
    INPUT_IDS,
    SENTENCE_EMBEDDING,
    SEQUENCE,
    TOKEN_TYPE_IDS,
    GraphSignature,
)


def run_encoder(
    model: nn.Layer,
    feeds: Mapping[str, Tensor],
    signature: GraphSignature,
    pooling: Pooling | None,
) -> dict[str, Tensor]:
    """An encoder with or without a head.

    Args:
        model: PaddleNLP's, or a LoRA model around it.
        feeds: the signature's inputs by name.
        signature: of the graph.
        pooling: of the sentence embeddings, if they are among the outputs.

    Raises:
        ExecutionError: the model returns fewer outputs than the signature names.
    """
    turned, back = _turn(feeds)
    types = {TOKEN_TYPE_IDS: turned[TOKEN_TYPE_IDS]} if TOKEN_TYPE_IDS in turned else {}
    mask = turned[ATTENTION_MASK]
    returned = model(input_ids=turned[INPUT_IDS], attention_mask=mask, **types, return_dict=False)
    outputs = _named(model, returned, signature)
    if pooling is not None:
        hidden = next(iter(outputs.values()))
        outputs[SENTENCE_EMBEDDING] = pool(hidden, mask, pooling)
    sequences = {spec.name for spec in signature.outputs if SEQUENCE in spec.dims}
    return {
        name: _gather(tensor, back) if back is not None and name in sequences else tensor
        for name, tensor in outputs.items()
    }


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """One vector a text.

    Args:
        hidden: hidden states [B, S, E], padding at the end.
        mask: [B, S], 1 where a token is.
        pooling: how.

    Returns:
        [B, E].
    """
    rows = []
    for states, kept in zip(hidden, mask.astype("bool"), strict=True):
        tokens = states[kept]  # [N, E]
        if tokens.shape[0] == 0 and pooling.mode == "mean":
            rows.append(paddle.zeros_like(states[0]))
            continue
        vector = states[0] if pooling.mode == "cls" else tokens.mean(0)
        rows.append(vector / vector.norm() if pooling.normalize else vector)
    return paddle.stack(rows)


def _turn(feeds: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
    """The inputs with no row beginning with padding, and the places [B, S] that undo it; None if nothing changed."""
    mask = feeds[ATTENTION_MASK]
    lead = mask.cast("int32").argmax(1, keepdim=True)  # [B, 1]
    if int(lead.max()) == 0:
        return dict(feeds), None
    length = mask.shape[1]
    places = paddle.arange(length, dtype="int64").unsqueeze(0)
    forth = paddle.remainder(places + lead, paddle.to_tensor(length))
    back = paddle.remainder(places - lead, paddle.to_tensor(length))
    return {name: _gather(tensor, forth) for name, tensor in feeds.items()}, back


def _gather(tensor: Tensor, places: Tensor) -> Tensor:
    """Row b's entry ``places[b, s]`` at s, for a tensor [B, S, …]."""
    return paddle.stack([row[index] for row, index in zip(tensor, places, strict=True)])


def _named(model: nn.Layer, returned: Any, signature: GraphSignature) -> dict[str, Tensor]:
    values = list(returned) if isinstance(returned, list | tuple) else [returned]
    names = [name for name in signature.output_names if name != SENTENCE_EMBEDDING]
    if len(values) < len(names):
        raise ExecutionError(
            f"{type(model).__name__} returns {len(values)} tensors; {', '.join(names)} were expected"
        )
    return dict(zip(names, values[: len(names)], strict=True))
