"""Loads state dicts into a wrapped model: of the adapter, of the base model, or of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import paddle

from peft_deploy.adapters.arrays import assign
from peft_deploy.adapters.lora.attachment import Attachment
from peft_deploy.adapters.lora.loading import branch_parameters
from peft_deploy.adapters.state_dict import check_state, given_array
from peft_deploy.weights.source import Array

WRAPPER = "model."


def load_state(attachment: Attachment, state_dict: Mapping[str, Any]) -> list[str]:
    """Loads what is given, or nothing when something does not fit.

    Args:
        attachment: the active adapter, unmerged.
        state_dict: tensors or arrays by name, with or without the prefix of the wrapper.

    Returns:
        Names of the model's state that were not given.

    Raises:
        AdapterError: unknown names, other shapes, or some but not all of the adapter's tensors.
    """
    targets: dict[str, paddle.Tensor] = dict(attachment.model.state_dict())
    values = {_own_name(name, targets): value for name, value in state_dict.items()}
    check_state(values, targets, branch_parameters(attachment), "adapter")
    extras: dict[str, Array] = {}
    for name, value in values.items():
        array = given_array(value, targets[name])
        if name in attachment.extras:
            extras[name] = array
        else:
            _load_one(attachment, name, targets[name], array)
    attachment.set_extra_values(extras)
    return [name for name in targets if name not in values]


def _load_one(attachment: Attachment, name: str, target: paddle.Tensor, array: Array) -> None:
    adapted = attachment.adapted.get(name.removesuffix(".weight"))
    if adapted is not None and name.endswith(".weight"):
        adapted.layer.load_split_weight(array)
    else:
        assign(target, array)


def _own_name(name: str, targets: Mapping[str, Any]) -> str:
    bare = name.removeprefix(WRAPPER)
    return bare if name not in targets and bare in targets else name
