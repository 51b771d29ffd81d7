"""State dicts that are given to a model with an adapter: what they may hold. Needs Paddle."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import paddle

from peft_deploy.adapters.arrays import dtype_name, to_array
from peft_deploy.errors import AdapterError, listed
from peft_deploy.weights.source import DTYPES, Array


def check_state(
    values: Mapping[str, Any], targets: Mapping[str, Any], own: Collection[str], owner: str
) -> None:
    """Passes when every value has its place in the model, and the adapter's come all or not at all.

    Args:
        values: what is given, by the model's names.
        targets: the model's tensors by name.
        own: names of the adapter's tensors.
        owner: whose they are, for messages: ``"adapter"``.

    Raises:
        AdapterError: unknown names, other shapes, or some but not all of the adapter's tensors.
    """
    unknown = [name for name in values if name not in targets]
    if unknown:
        raise AdapterError(f"the model has no parameters of these names:\n{listed(unknown)}")
    misshaped = [
        f"{name}: {list(value.shape)} given, {list(targets[name].shape)} in the model"
        for name, value in values.items()
        if list(value.shape) != list(targets[name].shape)
    ]
    if misshaped:
        raise AdapterError(f"tensors of another shape than the model's:\n{listed(misshaped)}")
    missing = [name for name in own if name not in values]
    if missing and len(missing) < len(own):
        raise AdapterError(f"some of the {owner}'s tensors are missing:\n{listed(missing)}")


def given_array(value: Any, target: paddle.Tensor) -> Array:
    """A value of a state dict, tensor or array, as an array."""
    if isinstance(value, paddle.Tensor):
        return to_array(value)
    array = np.asarray(value)
    # Arrays that come from paddle.save hold bfloat16 as bit patterns.
    if array.dtype == np.uint16 and dtype_name(target) in ("bfloat16", "float32", "float16"):
        return array.view(DTYPES["bfloat16"])
    return array
