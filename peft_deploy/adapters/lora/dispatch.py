"""Which LoRA layer takes the place of which module: an ordered tuple of factories, the first match
wins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from paddle import nn

from peft_deploy.adapters.lora.layer import LoRALayer
from peft_deploy.adapters.lora.linear import LoRALinear
from peft_deploy.config import LoRAConfig, LoRAConfigError

Parts: TypeAlias = "list[bool] | None"  # enable_lora of one target
Factory: TypeAlias = Callable[[nn.Layer, LoRAConfig, Parts], "LoRALayer | None"]


def _linear(module: nn.Layer, config: LoRAConfig, parts: Parts) -> LoRALayer | None:
    if not isinstance(module, nn.Linear):
        return None
    return LoRALinear.wrap(
        module,
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        rslora=config.rslora,
        lora_plus_scale=config.lora_plus_scale,
        pissa=config.pissa,
        dtype=config.dtype,
    )


FACTORIES: tuple[Factory, ...] = (_linear,)


def make_lora_layer(
    name: str, module: nn.Layer, config: LoRAConfig, parts: Parts = None
) -> LoRALayer:
    """The LoRA layer for a module, sharing its parameters.

    Args:
        name: the module's dotted name, for messages.
        module: what is to be adapted.
        config: the adapter's options.
        parts: for a fused projection, which of its parts get LoRA.

    Raises:
        LoRAConfigError: no LoRA layer exists for this kind of module; also a ValueError.
    """
    for factory in FACTORIES:
        layer = factory(module, config, parts)
        if layer is not None:
            layer.training = module.training
            return layer
    raise LoRAConfigError(
        f"LoRA strategy only supports {SUPPORTED}; {name} is a {type(module).__name__}",
        hint="make target_modules narrower: a pattern may match a container or a norm by accident",
    )


SUPPORTED = "paddle.nn.Linear"
