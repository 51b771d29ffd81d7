"""The loss: cross entropy of the tokens that are to be learned, and of no others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import nn

from peft_deploy.training.batches import IGNORED

OUTPUT_LAYER = "lm_head"


def completion_loss(model: nn.Layer, inputs: Mapping[str, paddle.Tensor]) -> paddle.Tensor:
    """The mean cross entropy over the positions that have a label, a float32 scalar.

    PaddleNLP's own criterion is not used: it takes the mean over the positions whose loss is
    above zero, and is 0 where there are no labels at all.

    Args:
        model: a causal language model.
        inputs: ``labels`` [B, S] shifted to the tokens that follow, and the model's own inputs.
    """
    labels = inputs["labels"].flatten()  # [B * S]
    kept = paddle.nonzero(labels != IGNORED).flatten()  # [N]
    with _only_rows(model, kept):
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
    logits = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
    if logits.ndim == 3:  # [B, S, V]: the output layer was not told to compute less
        logits = paddle.gather(logits.reshape([-1, logits.shape[-1]]), kept)  # [N, V]
    return F.cross_entropy(logits.astype("float32"), paddle.gather(labels, kept))


@contextmanager
def _only_rows(model: nn.Layer, rows: paddle.Tensor) -> Iterator[None]:
    """Makes the output layer compute the logits of some positions only.

    With a vocabulary of 49,000 the output layer is a fifth of SmolLM2's arithmetic, and most
    positions of a chat belong to the prompt.
    """
    head = next(
        (layer for name, layer in model.named_sublayers() if name.endswith(OUTPUT_LAYER)), None
    )
    if head is None:
        yield
        return

    def select(layer: nn.Layer, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = inputs[0]  # [B, S, E]
        return paddle.gather(hidden.reshape([-1, hidden.shape[-1]]), rows), *inputs[1:]

    hook = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()
