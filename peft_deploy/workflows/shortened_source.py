"""A model of some of another one's layers, to be checked in its place where that is larger than memory."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from peft_deploy.adapters.formats import Adapter
from peft_deploy.base import BaseModel
from peft_deploy.progress import Progress
from peft_deploy.weights import Array
from peft_deploy.workflows.sources import ExportSource, NamedAdapter, with_adapter_read

if TYPE_CHECKING:
    from paddle import nn


def shorten_source(source: ExportSource, base: BaseModel, layers: Sequence[int]) -> ExportSource:
    """What an export would be made of if the model had only these layers.

    Adapters that stay apart from the weights, and prefixes, are left out. The reference keeps its weights in
    temporary files, and only those of the layer that is at work in memory.

    Args:
        source: of the whole model, read from folders.
        base: the base model.
        layers: indices, ascending.

    Raises:
        UnsupportedModelError: the configuration does not say where others do how many layers there are.
    """
    short = base.with_layers(layers)
    parameters = short.names.with_layers(layers)
    adapter = source.adapter
    if adapter is not None:
        kept = shorten_adapter(adapter.adapter, parameters)
        adapter = NamedAdapter(adapter.name, kept) if kept.pairs or kept.replacements else None

    def load(progress: Progress, active: NamedAdapter | None) -> nn.Layer:
        from peft_deploy.base.dygraph import load_model
        from peft_deploy.base.mapped import release_after_use

        layer = load_model(short, progress=progress, mapped=True)
        if active is not None and active.adapter.pairs:
            layer = with_adapter_read(layer, active.adapter)
        elif active is not None:
            _replace(layer, active.adapter)  # a LoRA model wants a LoRA layer
        release_after_use(layer)
        return layer

    return replace(
        source,
        config=short.config,
        tensors=short.tensors,
        adapter=adapter,
        check=short.check,
        load_reference=lambda progress: load(progress, adapter),
        load_adapted=load,
        prefixes=(),
        kept=(),
        importance=source.importance and source.importance.renamed(parameters),
    )


def _replace(layer: nn.Layer, adapter: Adapter) -> None:
    """Puts the whole tensors of an adapter in place of the model's own."""
    from peft_deploy.adapters.arrays import assign

    parameters = dict(layer.named_parameters(remove_duplicate=False))
    for name, values in adapter.replacements.items():
        assign(parameters[name], values)


def shorten_adapter(adapter: Adapter, parameters: Mapping[str, str]) -> Adapter:
    """What an adapter does to the layers that are left.

    Args:
        adapter: of the whole model.
        parameters: parameter of the shorter model → of the whole one.
    """
    modules = {_module(new): _module(old) for new, old in parameters.items()}
    state: dict[str, Array] = {}
    for name, array in adapter.state.items():
        module = _module(name)
        for new, old in modules.items():
            if old == module:
                state[new + name[len(module) :]] = array
    pairs = {n: adapter.pairs[old] for n, old in modules.items() if old in adapter.pairs}
    replaced = {n: old for n, old in parameters.items() if old in adapter.replacements}
    config = adapter.config
    if not config.enable_lora_list:  # which says something of each of its patterns
        config = replace(config, target_modules=[re.escape(name) for name in sorted(pairs)])
    if config.trainable_modules is not None:
        config = replace(config, trainable_modules=[re.escape(n) for n in sorted(replaced)])
    return replace(
        adapter,
        config=config,
        state=state,
        pairs=pairs,
        replacements={n: adapter.replacements[old] for n, old in replaced.items()},
    )


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0]
