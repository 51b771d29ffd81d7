"""What layers have in common of which each tensor-parallel rank holds a slice."""

from __future__ import annotations

import paddle

from peft_deploy.adapters.lora.linear import refuse_variants
from peft_deploy.config import LoRAConfigError


def mark_slice(parameter: paddle.Tensor, is_mp: bool, axis: int) -> None:
    """Tells fleet that each rank holds a slice of the parameter."""
    parameter.is_distributed = is_mp
    if is_mp:
        parameter.split_axis = axis


def refuse_parallel(pissa: bool, use_mora: bool) -> None:
    """Refuses the variants that have no parallel form.

    Raises:
        LoRAConfigError: one of them is switched on.
    """
    refuse_variants(lora_use_mixer=False, use_mora=use_mora)
    if pissa:
        raise LoRAConfigError("pissa is not supported for tensor-parallel layers")
