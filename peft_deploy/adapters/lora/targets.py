"""Finds the modules that LoRA is to adapt, and where they hang in the model."""

from __future__ import annotations

from dataclasses import dataclass

from paddle import nn

from peft_deploy.adapters.lora.layer import LoRALayer
from peft_deploy.config import LoRAConfig, LoRAConfigError, match_patterns
from peft_deploy.errors import AdapterError, listed


@dataclass(frozen=True)
class Place:
    """Where a module hangs: under ``attribute`` of ``parent``."""

    parent: nn.Layer
    attribute: str

    def put(self, module: nn.Layer) -> None:
        """Hangs another module there."""
        setattr(self.parent, self.attribute, module)


def find_targets(
    model: nn.Layer, config: LoRAConfig, *, quiet: bool = False
) -> dict[str, list[bool] | None]:
    """The modules that ``target_modules`` means, with the fused parts to adapt (None for ordinary
    layers).

    Raises:
        LoRAConfigError: a pattern matches nothing, or two patterns want different parts of one
            module.
        AdapterError: there are LoRA layers in the model already.
    """
    modules = dict(model.named_sublayers())
    wrapped = [name for name, module in modules.items() if isinstance(module, LoRALayer)]
    if wrapped:
        raise AdapterError(
            f"the model already has LoRA layers:\n{listed(wrapped)}",
            hint="call restore_original_model() first, or load_adapter() for a second adapter",
        )
    patterns = config.target_patterns
    if not patterns:
        return {}
    matches = match_patterns(patterns, list(modules), "target_modules", quiet=quiet)
    targets: dict[str, list[bool] | None] = {}
    for pattern, parts in zip(patterns, config.enabled_parts(), strict=True):
        for name in matches[pattern]:
            if name in targets and targets[name] != parts:
                raise LoRAConfigError(
                    f"enable_lora_list wants both {targets[name]} and {parts} of {name}, "
                    "which two patterns of target_modules match"
                )
            targets[name] = parts
    return {name: targets[name] for name in modules if name in targets}


def module_at(model: nn.Layer, name: str) -> nn.Layer:
    """The module of a dotted name."""
    for part in name.split("."):
        model = model._sub_layers[part] if part in model._sub_layers else getattr(model, part)
    return model


def all_places(model: nn.Layer) -> dict[int, list[Place]]:
    """Everywhere that each module of the model hangs, by the module's id."""
    places: dict[int, list[Place]] = {}
    for parent in (model, *model.sublayers()):
        for attribute, child in parent._sub_layers.items():
            if child is not None:
                places.setdefault(id(child), []).append(Place(parent, attribute))
    return places
