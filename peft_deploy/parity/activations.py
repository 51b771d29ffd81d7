"""What the linear layers of the reference are given while it reads texts. Needs Paddle."""

from __future__ import annotations

from peft_deploy.environment import require_paddle

require_paddle("measuring activations")

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import paddle
from paddle import nn

from peft_deploy.adapters.lora import LoRAModel
from peft_deploy.parity.cases import Text
from peft_deploy.parity.play import read_text
from peft_deploy.parity.reference import PaddleReference

WEIGHT = ".weight"


def mean_squares(
    reference: PaddleReference, texts: Sequence[Text], weights: Collection[str]
) -> dict[str, npt.NDArray[np.float32]]:
    """The mean square of each input of linear layers, over all tokens of some texts.

    Args:
        reference: the model; left as it was.
        texts: are read alone, one after the other.
        weights: parameters [in, out] of the layers.

    Returns:
        Weight → float32 [in]; a weight that is used by no module of its own has no entry.
    """
    model = reference.model
    inner = model.model if isinstance(model, LoRAModel) else model
    sums = dict[str, npt.NDArray[np.float64]]()
    counts = dict[str, int]()

    def note(weight: str, inputs: Any) -> None:
        value = inputs[0] if inputs else None
        if not isinstance(value, paddle.Tensor) or value.dtype != paddle.float32:
            return
        rows = value.numpy().astype(np.float64)
        rows = rows.reshape(-1, rows.shape[-1])
        sums[weight] = sums.get(weight, 0.0) + (rows * rows).sum(0)
        counts[weight] = counts.get(weight, 0) + len(rows)

    with _watched(inner, weights, note):
        for text in texts:
            read_text(reference, text)
    return {
        weight: (total / max(counts[weight], 1)).astype(np.float32)
        for weight, total in sums.items()
    }


@contextmanager
def _watched(model: nn.Layer, weights: Collection[str], note: Any) -> Iterator[None]:
    hooks = []
    for name, layer in model.named_sublayers():
        weight = f"{name}{WEIGHT}"
        if weight in weights:
            hooks.append(
                layer.register_forward_pre_hook(lambda _, given, w=weight: note(w, given))
            )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
