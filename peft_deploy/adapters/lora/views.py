"""A LoRA model's two halves, as they are: the base model's values and the active adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from peft_deploy.adapters.arrays import to_array
from peft_deploy.adapters.formats.adapter import Adapter
from peft_deploy.adapters.formats.pairs import build_pairs
from peft_deploy.adapters.lora.model import LoRAModel
from peft_deploy.weights import Array


def is_disabled(model: LoRAModel) -> bool:
    """Whether the model computes without its adapter at the moment."""
    return model._attachment.disabled


def adapter_of(model: LoRAModel) -> Adapter:
    """The active adapter, as if it had been saved and read; whether merged or disabled.

    Raises:
        AdapterError: its tensors are not those of its configuration.
    """
    config = model.lora_config
    state = {name: to_array(t) for name, t in model.get_trainable_state_dict().items()}
    where = Path("the model in memory")
    pairs, replacements = build_pairs(state, config, str(where))
    return Adapter(where, config, state, pairs, replacements)


def merged_value(model: LoRAModel, name: str) -> Array:
    """A parameter of the base model with the adapter in it, whatever the model's state.

    Args:
        model: the LoRA model.
        name: the parameter's name in the base model.

    Raises:
        AdapterError: a merged weight is not finite in its type.
    """
    attachment = model._attachment
    adapted = attachment.adapted.get(name.removesuffix(".weight"))
    if adapted is not None and name.endswith(".weight"):
        return adapted.layer.merged_weight()
    extras = attachment.extra_values()
    return extras[name] if name in extras else to_array(dict(model.model.named_parameters())[name])


@contextmanager
def base_forward(model: LoRAModel) -> Iterator[None]:
    """The model's forward is the base model's, as it is when the adapter is merged; no weight is touched.

    Raises:
        AdapterError: an adapted weight is shared with a layer that is not adapted, so that the merged model would
            compute something else.
    """
    model._attachment.refuse_shared_weights()
    with ExitStack() as stack:
        for layer in model._attachment.layers():
            stack.enter_context(layer.branch_left_out())
        yield


def base_value(model: LoRAModel, name: str) -> Array:
    """A parameter of the base model as it was before LoRA, whatever the model's state.

    Args:
        model: the LoRA model.
        name: the parameter's name in the base model.
    """
    attachment = model._attachment
    if name in attachment.base_values:
        return attachment.base_values[name]
    adapted = attachment.adapted.get(name.removesuffix(".weight"))
    if adapted is not None and name.endswith(".weight"):
        return adapted.layer.original_weight()
    return to_array(dict(model.model.named_parameters())[name])
