"""One adapter of a model: its LoRA layers, the tensors it replaces, and putting both in place and
away again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import paddle
from paddle import nn

from peft_deploy.adapters.arrays import assign, to_array
from peft_deploy.adapters.lora.dispatch import make_lora_layer
from peft_deploy.adapters.lora.layer import LoRALayer
from peft_deploy.adapters.lora.targets import Place, all_places, find_targets, module_at
from peft_deploy.adapters.lora.trainable import extra_parameters
from peft_deploy.config import LoRAConfig
from peft_deploy.errors import AdapterError, listed
from peft_deploy.weights.source import Array


@dataclass
class Adapted:
    """One adapted module.

    Args:
        original: the module that was there; untouched.
        layer: the LoRA layer that shares its parameters.
        places: everywhere the module hangs in the model.
    """

    original: nn.Layer
    layer: LoRALayer
    places: list[Place]


@dataclass
class Attachment:
    """One adapter and the model that it belongs to.

    Args:
        model: the base model.
        config: the adapter's options.
        adapted: the adapted modules by dotted name.
        extras: base parameters that the adapter trains or replaces, by name.
        base_values: their values in the base model.
        own_values: their values in the adapter, while they are not in the model.
        attached: whether the LoRA layers hang in the model.
        disabled: whether the model is to compute as if there was no adapter.
    """

    model: nn.Layer
    config: LoRAConfig
    adapted: dict[str, Adapted] = field(default_factory=dict)
    extras: dict[str, paddle.Tensor] = field(default_factory=dict)
    base_values: dict[str, Array] = field(default_factory=dict)
    own_values: dict[str, Array] | None = field(default_factory=dict)
    attached: bool = False
    disabled: bool = False

    @classmethod
    def create(cls, model: nn.Layer, config: LoRAConfig, *, quiet: bool = False) -> Attachment:
        """A fresh adapter for a model, not yet attached; the model is unchanged.

        Args:
            model: the base model, without any LoRA layer in it.
            config: the adapter's options.
            quiet: no warning about patterns that match nothing beside others that do.

        Raises:
            LoRAConfigError: a pattern that matches nothing, or a module that LoRA does not
                support.
            AdapterError: the model is already wrapped.
        """
        targets = find_targets(model, config, quiet=quiet)
        attachment = cls(model, config)
        places = all_places(model)
        try:
            for name, parts in targets.items():
                module = module_at(model, name)
                layer = make_lora_layer(name, module, config, parts)
                layer.where = f"{name}.weight"
                layer.detach()
                attachment.adapted[name] = Adapted(module, layer, places[id(module)])
            attachment.add_extras(extra_parameters(model, config, attachment.adapted))
        except BaseException:
            for done in attachment.adapted.values():
                done.layer.detach()
            raise
        return attachment

    def layers(self) -> Iterator[LoRALayer]:
        """The LoRA layers."""
        return (adapted.layer for adapted in self.adapted.values())

    @property
    def merged(self) -> bool:
        """Whether the adapter is merged into the weights."""
        return any(layer.merged for layer in self.layers())

    def add_extras(self, parameters: Mapping[str, paddle.Tensor]) -> None:
        """Remembers base parameters that this adapter changes, with their values of now."""
        for name, parameter in parameters.items():
            if name not in self.extras:
                self.extras[name] = parameter
                self.base_values[name] = to_array(parameter)
                if self.own_values is not None:
                    self.own_values[name] = self.base_values[name]

    def attach(self) -> None:
        """Hangs the LoRA layers into the model and puts the adapter's own tensors in place."""
        if self.attached:
            return
        for adapted in self.adapted.values():
            adapted.layer.training = adapted.original.training
            for place in adapted.places:
                place.put(adapted.layer)
            adapted.layer.attach()
        self.attached = True
        if not self.disabled:
            self._swap_extras_in()

    def detach(self) -> None:
        """Puts everything back as it was before LoRA, exact to the bit; the adapter keeps its
        tensors.
        """
        if not self.attached:
            return
        for adapted in self.adapted.values():
            adapted.layer.detach()
            adapted.original.training = adapted.layer.training
            for place in adapted.places:
                place.put(adapted.original)
        self._swap_extras_out()
        self.attached = False

    def disable(self) -> None:
        """Makes the model compute what it computed before LoRA, whatever was merged."""
        for layer in self.layers():
            layer.disable_lora = True
        if self.attached:
            self._swap_extras_out()
        self.disabled = True

    def enable(self) -> None:
        """Ends :meth:`disable`; the adapter is then active and not merged."""
        for layer in self.layers():
            layer.disable_lora = False
        if self.attached:
            self._swap_extras_in()
        self.disabled = False

    def merge(self) -> None:
        """Merges all layers or none.

        Raises:
            AdapterError: LoRA is disabled, a weight is shared with a module outside, or a sum is
                not finite.
        """
        self.refuse_shared_weights()
        done: list[LoRALayer] = []
        try:
            for layer in self.layers():
                if not layer.merged:
                    layer.merge()
                    done.append(layer)
        except AdapterError:
            for layer in done:
                layer.unmerge()
            raise

    def unmerge(self) -> None:
        """Takes the adapter out of the weights again, exact to the bit."""
        for layer in self.layers():
            layer.unmerge()

    def extra_values(self) -> dict[str, Array]:
        """The adapter's own values of the base parameters that it changes."""
        if self.own_values is not None:
            return dict(self.own_values)
        return {name: self._unmerged(name, tensor) for name, tensor in self.extras.items()}

    def set_extra_values(self, values: Mapping[str, Array]) -> None:
        """Gives the adapter other values for (some of) them; not while merged."""
        if self.own_values is not None:
            self.own_values.update(values)
            return
        for name, value in values.items():
            assign(self.extras[name], value)

    def _unmerged(self, name: str, tensor: paddle.Tensor) -> Array:
        """A trained weight of an adapted layer as it is without A · B."""
        adapted = self.adapted.get(name.removesuffix(".weight"))
        return adapted.layer.split_weight() if adapted else to_array(tensor)

    def _swap_extras_in(self) -> None:
        if self.own_values is not None:
            for name, value in self.own_values.items():
                assign(self.extras[name], value)
            self.own_values = None

    def _swap_extras_out(self) -> None:
        if self.own_values is None and self.extras:
            self.own_values = {name: to_array(tensor) for name, tensor in self.extras.items()}
            for name, value in self.base_values.items():
                assign(self.extras[name], value)

    def refuse_shared_weights(self) -> None:
        """Passes when every adapted weight is that of its own layer only.

        Raises:
            AdapterError: one is shared with a module outside.
        """
        owners: dict[int, list[str]] = {}
        for name, layer in self.model.named_sublayers():
            for key, parameter in layer._parameters.items():
                if parameter is not None:
                    owners.setdefault(id(parameter), []).append(f"{name}.{key}")
        shared = [
            " = ".join(owners[id(adapted.layer.weight)])
            for adapted in self.adapted.values()
            if len(owners.get(id(adapted.layer.weight), ())) > 1
        ]
        if shared:
            raise AdapterError(
                "merging would change layers that were not adapted, because they share a weight:\n"
                + listed(shared),
                hint="keep the adapter unmerged, or untie the weights first",
            )


def for_model(config: LoRAConfig, model: nn.Layer) -> LoRAConfig:
    """A copy of the options with what the model and Paddle decide filled in, as the reference
    does.
    """
    own = copy.copy(config)
    own.dtype = config.dtype or paddle.get_default_dtype()
    degree = getattr(getattr(model, "config", None), "tensor_parallel_degree", None)
    if degree is not None:
        own.tensor_parallel_degree = degree
    return own
