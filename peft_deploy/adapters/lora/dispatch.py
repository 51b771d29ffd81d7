"""Which LoRA layer takes the place of which module: an ordered tuple of factories, the first match
wins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from paddle import nn
from paddle.distributed.fleet.meta_parallel import ColumnParallelLinear, RowParallelLinear

from peft_deploy.adapters.arrays import dtype_name
from peft_deploy.adapters.lora.column_parallel import (
    ColumnParallelLoRALinear,
    ColumnParallelLoRAMergedLinear,
)
from peft_deploy.adapters.lora.conv import LoRAConv2D
from peft_deploy.adapters.lora.embedding import LoRAEmbedding
from peft_deploy.adapters.lora.layer import LoRALayer
from peft_deploy.adapters.lora.linear import LoRALinear
from peft_deploy.adapters.lora.merged_linear import LoRAMergedLinear
from peft_deploy.adapters.lora.row_parallel import RowParallelLoRALinear
from peft_deploy.config import LoRAConfig, LoRAConfigError
from peft_deploy.weights import FLOATING

Parts: TypeAlias = "list[bool] | None"  # enable_lora of one target
Factory: TypeAlias = Callable[[nn.Layer, LoRAConfig, Parts], "LoRALayer | None"]


def _fused_linear(module: nn.Layer, config: LoRAConfig, parts: Parts) -> LoRALayer | None:
    if parts is None or not _computes_as(module, nn.Linear) or config.head_dim is None:
        return None
    _refuse_scaling_variants("LoRAMergedLinear", config)
    return LoRAMergedLinear.wrap(
        module, head_dim=config.head_dim, enable_lora=parts, **_common(config)
    )


def _linear(module: nn.Layer, config: LoRAConfig, parts: Parts) -> LoRALayer | None:
    if parts is not None or not _computes_as(module, nn.Linear):
        return None
    return LoRALinear.wrap(module, rslora=config.rslora, pissa=config.pissa, **_common(config))


def _conv(module: nn.Layer, config: LoRAConfig, parts: Parts) -> LoRALayer | None:
    if parts is not None or not _computes_as(module, nn.Conv2D):
        return None
    _refuse_scaling_variants("LoRAConv2D", config)
    return LoRAConv2D.wrap(module, **_common(config))


def _embedding(module: nn.Layer, config: LoRAConfig, parts: Parts) -> LoRALayer | None:
    if parts is not None or not _computes_as(module, nn.Embedding):
        return None
    _refuse_pissa(module, config)
    return LoRAEmbedding.wrap(module, rslora=config.rslora, **_common(config))


def _column_parallel(module: nn.Layer, config: LoRAConfig, parts: Parts) -> LoRALayer | None:
    if not _computes_as(module, ColumnParallelLinear):
        return None
    _refuse_pissa(module, config)
    if parts is None or config.head_dim is None:
        return ColumnParallelLoRALinear.wrap(module, rslora=config.rslora, **_common(config))
    _refuse_scaling_variants("ColumnParallelLoRAMergedLinear", config)
    return ColumnParallelLoRAMergedLinear.wrap(
        module, head_dim=config.head_dim, enable_lora=parts, **_common(config)
    )


def _row_parallel(module: nn.Layer, config: LoRAConfig, parts: Parts) -> LoRALayer | None:
    if parts is not None or not _computes_as(module, RowParallelLinear):
        return None
    _refuse_pissa(module, config)
    return RowParallelLoRALinear.wrap(module, rslora=config.rslora, **_common(config))


def _computes_as(module: nn.Layer, kind: type[nn.Layer]) -> bool:
    """Whether the module is of this kind, and not a variant that computes something else."""
    if not isinstance(module, kind):
        return False
    if type(module).forward is not kind.forward or "forward" in vars(module):
        raise LoRAConfigError(
            f"{type(module).__name__} is a {kind.__name__} with a forward of its own, "
            "which LoRA would replace"
        )
    return True


def _refuse_quantized(name: str, module: nn.Layer) -> None:
    weight = getattr(module, "weight", None)
    if weight is not None and dtype_name(weight) not in FLOATING:
        raise LoRAConfigError(
            f"the weight of {name} is {dtype_name(weight)}: a quantized base model is not supported",
            hint="load the base model in float32, float16 or bfloat16",
        )


def _refuse_pissa(module: nn.Layer, config: LoRAConfig) -> None:
    if config.pissa:
        raise LoRAConfigError(f"pissa is not supported for {type(module).__name__}")


def _common(config: LoRAConfig) -> dict[str, Any]:
    return {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "lora_plus_scale": config.lora_plus_scale,
        "dtype": config.dtype,
    }


def _refuse_scaling_variants(layer: str, config: LoRAConfig) -> None:
    # The reference ignores both here and scales by alpha / R; doing what the options say would
    # give other numbers for an adapter that it trained, so there is no right answer.
    if config.rslora or config.pissa:
        name = "rslora" if config.rslora else "pissa"
        raise LoRAConfigError(f"{name} is not supported for {layer}")


# A fused projection is a Linear too, so it has to be asked for first; the rest exclude each other.
FACTORIES: tuple[Factory, ...] = (
    _fused_linear,
    _linear,
    _conv,
    _embedding,
    _column_parallel,
    _row_parallel,
)


SUPPORTED = "paddle.nn.Linear, Conv2D, Embedding, ColumnParallelLinear and RowParallelLinear"


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
    _refuse_quantized(name, module)
    for factory in FACTORIES:
        layer = factory(module, config, parts)
        if layer is not None:
            layer.training = module.training
            return layer
    raise LoRAConfigError(
        f"LoRA strategy only supports {SUPPORTED}; {name} is a {type(module).__name__}"
        + (" and enable_lora_list names parts of it" if parts is not None else ""),
        hint="make target_modules narrower: a pattern may match a container or a norm by accident",
    )
