"""Loads state dicts into a prefix model: of the encoder, of the base model, or of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import paddle

from peft_deploy.adapters.arrays import assign
from peft_deploy.adapters.state_dict import check_state, given_array

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
    own = [name for name in targets if name.startswith(ENCODER)]
    check_state(values, targets, own, "prefix")
    for name, value in values.items():
        assign(targets[name], given_array(value, targets[name]))
    return [name for name in targets if name not in values]


def _full_name(name: str, targets: Mapping[str, Any]) -> str:
    return ENCODER + name if ENCODER + name in targets else name
