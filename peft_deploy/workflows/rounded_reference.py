"""A reference that computes with the numbers that a bundle of lower precision holds. Needs Paddle.

What a bundle computes is compared with PaddleNLP's forward on the very same weights, so that the coarseness of the
weights is no part of the error, and the limits can stay tight. That these are the weights that were trained is a check
of its own: before they are rounded, they have to be those of the dynamic graph, adapter included.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from peft_deploy.config.precision import FP32, PRECISIONS, Precision
from peft_deploy.errors import ParityError, listed
from peft_deploy.progress import Progress
from peft_deploy.weights.blocks import row_blocks
from peft_deploy.weights.cast import round_to
from peft_deploy.weights.source import DTYPES, Array
from peft_deploy.workflows.sources import EXPORT_DTYPE, MEMORY, ExportSource, NamedAdapter
from peft_deploy.workflows.storage import decoded

if TYPE_CHECKING:
    from paddle import nn

    from peft_deploy.adapters.lora.layer import LoRALayer

# Two float32 sums of an adapter's rank differ by a few roundings of the weight and of the change.
_OF_WEIGHT, _OF_CHANGE = 1e-6, 1e-4


def load_stored(
    source: ExportSource,
    precision: str,
    progress: Progress,
    named: NamedAdapter | None = None,
    *,
    before: Callable[[nn.Layer], None] | None = None,
) -> nn.Layer:
    """The reference for a bundle of this precision.

    Args:
        source: the model.
        precision: of the bundle.
        progress: gets phases.
        named: an adapter that the bundle keeps apart, to be active; None for the one that is merged, if any.
        before: is given the model as it was trained, for a precision other than fp32.

    Raises:
        ParityError: the weights that an export writes, before they are rounded, are not those of the dynamic graph.
    """
    model = (
        source.load_reference(progress) if named is None else source.load_adapted(progress, named)
    )
    if precision == FP32:
        return model
    if source.layout == MEMORY:
        model = copy.deepcopy(model)  # the user's own
    if before is not None:
        progress.phase("Reading a text in float32")
        before(model)
    progress.phase("Rounding the reference's weights")
    _store(model, source, PRECISIONS[precision], slots=named is not None)
    return model


def _store(model: nn.Layer, source: ExportSource, precision: Precision, *, slots: bool) -> None:
    from peft_deploy.adapters.arrays import assign
    from peft_deploy.adapters.lora import LoRAModel
    from peft_deploy.adapters.lora.layer import LoRALayer
    from peft_deploy.base.mapped import release_pages

    inner = model.model if isinstance(model, LoRAModel) else model
    parameters = dict(inner.named_parameters(remove_duplicate=False))
    layers = {
        name: layer for name, layer in inner.named_sublayers() if isinstance(layer, LoRALayer)
    }
    numbers, whole = decoded(source, precision), source.merged(EXPORT_DTYPE)
    wrong: list[str] = []
    for name in numbers.names():
        release_pages()  # of what came before
        module, _, attribute = name.rpartition(".")
        if attribute != "weight" or module not in layers:
            if name in parameters:  # or what no output depends on
                assign(parameters[name], numbers.read(name))
            continue
        layer = layers[module]
        if not slots:
            wrong += _compare(name, layer.merged_weight(), whole.read(name), layer.split_weight())
        _put_behind_branch(layer, numbers.read(name), slots=slots, dtype=precision.dtype)
    release_pages()
    if wrong:
        raise ParityError(
            f"{len(wrong)} weights are not those of the model with its adapter active:\n{listed(wrong)}"
        )


def _compare(name: str, wanted: Array, have: Array, base: Array) -> list[str]:
    """What is wrong with a merged weight: nothing, or one sentence."""
    change, gap = _apart(wanted, base), _apart(wanted, have)
    limit = (
        _OF_WEIGHT * float(max(wanted.max(initial=0), -wanted.min(initial=0)))
        + _OF_CHANGE * change
    )
    if gap <= limit:
        return []
    return [f"{name}: off by {gap:.3g}, where the adapter changes it by {change:.3g}"]


def _apart(one: Array, other: Array) -> float:
    """The largest difference of two arrays, computed in float64; NaN where one of them has a NaN."""
    gaps = [
        np.abs(one[rows].astype(np.float64) - other[rows].astype(np.float64)).max(initial=0)
        for rows in row_blocks(one.shape, np.dtype(np.float64).itemsize)
    ]
    return float(np.max(gaps, initial=0))


def _put_behind_branch(layer: LoRALayer, stored: Array, *, slots: bool, dtype: str) -> None:
    """Makes the layer compute with these numbers, its branch still apart from its weight.

    Args:
        layer: with its branch active.
        stored: with the adapter in it, or without it for a layer whose adapter fills slots.
        slots: whether it does.
        dtype: of the slots.
    """
    from peft_deploy.adapters.arrays import assign, to_array

    if not slots:
        split, merged = layer.split_weight(), layer.merged_weight()
        apart = np.empty(split.shape, np.float32)
        for rows in row_blocks(split.shape, np.dtype(np.float64).itemsize):
            change = merged[rows].astype(np.float64) - split[rows].astype(np.float64)
            apart[rows] = stored[rows].astype(np.float64) - change
        layer.load_split_weight(apart)
        return
    layer.load_split_weight(stored)
    branch: Any = layer
    for parameter, factor in ((branch.lora_A, 1.0), (branch.lora_B, float(branch.scaling))):
        values = to_array(parameter).astype(np.float64) * factor
        rounded = round_to(values.astype(np.float32), DTYPES[dtype]).astype(np.float64)
        assign(parameter, rounded / factor)
