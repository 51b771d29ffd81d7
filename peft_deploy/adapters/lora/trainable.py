"""Which parameters of a model with LoRA layers are trained."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import paddle
from paddle import nn

from peft_deploy.adapters.lora.layer import LoRALayer
from peft_deploy.config import LoRAConfig, LoRAConfigError, match_pattern, match_patterns

BRANCH = ("lora_A", "lora_B")


def named_parameters(model: nn.Layer) -> dict[str, paddle.Tensor]:
    """All parameters under all their names; a shared one appears under each."""
    return dict(model.named_parameters(remove_duplicate=False))


def is_branch(name: str) -> bool:
    """Whether a parameter belongs to a LoRA branch, judging by its name."""
    return name.rpartition(".")[2] in BRANCH


def extra_parameters(
    model: nn.Layer, config: LoRAConfig, adapted: Collection[str]
) -> dict[str, paddle.Tensor]:
    """The base model's parameters that the configuration has trained beside A and B, by name.

    ``trainable_modules`` may name modules or parameters; of a module, all parameters.

    Args:
        model: the base model, with or without LoRA layers in it.
        config: the adapter's options.
        adapted: names of the adapted modules.

    Raises:
        LoRAConfigError: a pattern matches nothing, or PiSSA is to train a weight that it has
            split.
    """
    base = {name: p for name, p in named_parameters(model).items() if not is_branch(name)}
    chosen = _biases(base, adapted, config.trainable_bias)
    if config.trainable_patterns:
        modules = [name for name, _ in model.named_sublayers()]
        found = match_patterns(config.trainable_patterns, [*modules, *base], "trainable_modules")
        for pattern, names in found.items():
            roots = set(names) | _full_matches(pattern, modules, base)
            chosen |= {n for n in base if n in roots or any(n.startswith(f"{r}.") for r in roots)}
    split = [name for name in chosen if config.pissa and name.removesuffix(".weight") in adapted]
    if split:
        raise LoRAConfigError(
            f"trainable_modules matches {split[0]}, "
            "which PiSSA has split into A, B and a frozen rest"
        )
    return {name: base[name] for name in base if name in chosen}


def mark_only_lora_as_trainable(model: nn.Layer, bias: str | None = None) -> None:
    """Freezes everything but the LoRA matrices, and what a LoRAModel's configuration names
    besides.

    Args:
        model: a LoRAModel, or any model with LoRA layers in it.
        bias: for a model that is no LoRAModel: None, ``"lora"`` (biases of the adapted layers) or
            ``"all"``.
    """
    method = getattr(model, "mark_only_lora_as_trainable", None)
    if method is not None:
        method()
        return
    adapted = {name for name, layer in model.named_sublayers() if isinstance(layer, LoRALayer)}
    freeze_all_but(model, extra_parameters(model, LoRAConfig(trainable_bias=bias), adapted))


def freeze_all_but(model: nn.Layer, extras: dict[str, Any]) -> None:
    """Freezes every parameter that is neither A nor B of a LoRA layer nor one of ``extras``."""
    trained = {id(parameter) for parameter in extras.values()}
    for layer in model.sublayers(include_self=True):
        if isinstance(layer, LoRALayer):
            trained |= {id(layer.lora_A), id(layer.lora_B)}
    for parameter in named_parameters(model).values():
        parameter.stop_gradient = id(parameter) not in trained


def _biases(base: dict[str, Any], adapted: Collection[str], which: str | None) -> set[str]:
    if which is None:
        return set()
    biases = {name for name in base if "bias" in name.rpartition(".")[2]}
    if which == "all":
        return biases
    return {name for name in biases if name.rpartition(".")[0] in adapted}


def _full_matches(pattern: str, modules: list[str], base: dict[str, Any]) -> set[str]:
    return {*match_pattern(pattern, modules), *match_pattern(pattern, list(base))}
