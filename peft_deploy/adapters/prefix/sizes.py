"""A prefix's sizes: what the options leave open is filled in from the model, and what they say is
compared with it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import paddle
from paddle import nn

from peft_deploy.adapters.prefix.errors import UnsupportedPrefixModelError
from peft_deploy.config import PrefixConfig, PrefixConfigError
from peft_deploy.families import PastDims, PastRule, find_past_rule, past_dims


def rule_of(model: nn.Layer) -> PastRule | None:
    """What the model does with a past; None for a model that nobody has described."""
    config: Any = getattr(model, "config", None)
    kind = getattr(type(config), "model_type", None)
    return find_past_rule(getattr(model, "base_model_prefix", None), kind)


def dims_of(model: nn.Layer) -> PastDims:
    """The model's sizes, as far as its configuration says them."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return PastDims()
    return past_dims(config.to_dict(), rule_of(model))


def resolve_config(config: PrefixConfig, model: nn.Layer) -> tuple[PrefixConfig, int]:
    """The options with all sizes, and D, the size of one attention head.

    Args:
        config: the options; not changed.
        model: the model that the prefix is for.

    Raises:
        PrefixConfigError: a size that neither says, or that the two say differently.
        UnsupportedPrefixModelError: a tensor-parallel model.
    """
    dims = dims_of(model)
    _refuse_parallel(model)
    filled = replace(
        config,
        num_attention_heads=config.num_attention_heads or dims.num_heads,
        multi_query_group_num=config.multi_query_group_num or _groups(config, dims),
        num_hidden_layers=config.num_hidden_layers or dims.num_layers,
        hidden_size=config.hidden_size or dims.hidden_size,
        tensor_parallel_degree=_parallel_degree(model, config),
        dtype=config.dtype or paddle.get_default_dtype(),
    )
    if filled.prefix_projection and filled.prefix_projection_hidden_size is None:
        filled = replace(filled, prefix_projection_hidden_size=filled.hidden_size)
    _refuse_gaps(filled, model)
    derived = (filled.hidden_size or 0) // (filled.num_attention_heads or 1)
    _refuse_contradictions(filled, dims, derived)
    return filled, dims.head_dim or derived


def _groups(config: PrefixConfig, dims: PastDims) -> int | None:
    return dims.num_kv_heads or config.num_attention_heads


def _parallel_degree(model: nn.Layer, config: PrefixConfig) -> int:
    rule = rule_of(model)
    if rule is not None and not rule.parallel_prefix:
        return -1
    own: Any = getattr(getattr(model, "config", None), "tensor_parallel_degree", None)
    return config.tensor_parallel_degree if own is None else int(own)


def _refuse_parallel(model: nn.Layer) -> None:
    degree = getattr(getattr(model, "config", None), "tensor_parallel_degree", 1)
    if degree > 1:
        raise UnsupportedPrefixModelError(
            f"the model has tensor_parallel_degree {degree}; prefix-tuning works on a single rank"
        )


def _refuse_gaps(config: PrefixConfig, model: nn.Layer) -> None:
    if config.num_prefix_tokens is None:
        raise PrefixConfigError(
            "num_prefix_tokens is None; the number of prefix tokens has to be chosen"
        )
    names = ("num_attention_heads", "num_hidden_layers", "hidden_size")
    absent = [name for name in names if getattr(config, name) is None]
    if absent:
        raise PrefixConfigError(
            f"the configuration of {type(model).__name__} does not say {', '.join(absent)}",
            hint="give it in the PrefixConfig",
        )


def _refuse_contradictions(config: PrefixConfig, dims: PastDims, derived: int) -> None:
    pairs = {
        "num_hidden_layers": (config.num_hidden_layers, dims.num_layers),
        "num_attention_heads": (config.num_attention_heads, dims.num_heads),
        "multi_query_group_num": (config.multi_query_group_num, dims.num_kv_heads),
    }
    # The reference knows D only as E // H; who had to make up an E to get D right is served too.
    if derived != dims.head_dim:
        pairs["hidden_size"] = (config.hidden_size, dims.hidden_size)
    wrong = [
        f"{name} is {given}, but the model's is {own}"
        for name, (given, own) in pairs.items()
        if own is not None and given != own
    ]
    if wrong:
        raise PrefixConfigError(
            "the PrefixConfig is for another model: " + "; ".join(wrong),
            hint="leave these options out: they are filled in from the model",
        )
