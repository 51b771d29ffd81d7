"""Loads state dicts into a prefix model: of the encoder, of the base model, or of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import paddle

from peft_deploy.adapters.arrays import assign, dtype_name, to_array
from peft_deploy.errors import AdapterError, listed
from peft_deploy.weights.source import DTYPES, Array

if TYPE_CHECKING:
    from peft_deploy.adapters.prefix.model import PrefixModelForCausalLM

ENCODER = "prefix_encoder."


def load_state(model: PrefixModelForCausalLM, state_dict: Mapping[str, Any]) -> list[str]:
    """Loads what is given, or nothing when something does not fit.

    Args:
        model: the prefix model.
        state_dict: tensors or arrays; the encoder's names with or without their prefix.

    Returns:
        Names of the model's state that were not given.

    Raises:
        AdapterError: unknown names, other shapes, or some but not all of the encoder's tensors.
    """
    targets: dict[str, paddle.Tensor] = dict(model.state_dict())
    values = {_full_name(name, targets): value for name, value in state_dict.items()}
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
    own = [name for name in targets if name.startswith(ENCODER)]
    missing = [name for name in own if name not in values]
    if 0 < len(missing) < len(own):
        raise AdapterError(f"some of the prefix's tensors are missing:\n{listed(missing)}")
    for name, value in values.items():
        assign(targets[name], _array(value, targets[name]))
    return [name for name in targets if name not in values]


def _full_name(name: str, targets: Mapping[str, Any]) -> str:
    return ENCODER + name if ENCODER + name in targets else name


def _array(value: Any, target: paddle.Tensor) -> Array:
    if isinstance(value, paddle.Tensor):
        return to_array(value)
    array = np.asarray(value)
    # Arrays that come from paddle.save hold bfloat16 as bit patterns.
    if array.dtype == np.uint16 and dtype_name(target) in ("bfloat16", "float32", "float16"):
        return array.view(DTYPES["bfloat16"])
    return array
