"""LoRAModel: a model and its LoRA adapters, one of which is active."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import paddle
from paddle import nn

from peft_deploy.adapters.arrays import to_tensor
from peft_deploy.adapters.lora.adapter_files import AdapterFolders
from peft_deploy.adapters.lora.attachment import Attachment, for_model
from peft_deploy.adapters.lora.named_adapters import NamedAdapters
from peft_deploy.adapters.lora.ranks import split
from peft_deploy.adapters.lora.state import load_state
from peft_deploy.adapters.lora.trainable import (
    freeze_all_but,
    is_branch,
    named_parameters,
)
from peft_deploy.adapters.wrapper import ModelWrapper
from peft_deploy.config import LoRAConfig, LoRAConfigTypeError
from peft_deploy.errors import AdapterError

DEFAULT_ADAPTER = "default"
_REFUSED = MappingProxyType(
    {
        "get_lora_model": "LoRAModel(model, lora_config) puts the layers into the model",
        "add_lora_split_mapping": "which tensors are spread over ranks follows from the layers",
        "save_to_aistudio": "save_pretrained() the adapter, and upload the folder",
    }
)


class LoRAModel(AdapterFolders, NamedAdapters, ModelWrapper):
    """A model whose linear layers have got LoRA branches; everything else of it is forwarded.

    The layers are replaced inside the model that is passed in; :meth:`restore_original_model`
    gives it back as it was, exact to the bit. Only A, B and what the configuration names besides
    are trainable.

    Args:
        model: any ``paddle.nn.Layer``; a PaddleNLP model's ``config`` is used when there is one.
        lora_config: the adapter's options; copied. The two arguments may come in either order.

    Raises:
        LoRAConfigError: a pattern matches nothing, or a module that LoRA does not support; also a
            ValueError.
        AdapterError: the model has LoRA layers already.

    Example:
        >>> model = LoRAModel(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2,
        target_modules=["0"])) >>> sorted(model.get_trainable_state_dict()) ['0.lora_A',
        '0.lora_B']
    """

    counterpart = ("paddlenlp.peft.lora", "LoRAModel")
    refused = _REFUSED
    quantized = False  # what PaddleNLP's Trainer asks of a LoRA model
    is_pipelinemodel = False

    def __init__(self, model: nn.Layer, lora_config: LoRAConfig) -> None:
        super().__init__()
        self._start(*_in_order(model, lora_config))

    def _start(self, model: nn.Layer, config: LoRAConfig, *, quiet: bool = False) -> None:
        _refuse_wrapped(model)
        config = for_model(config, model)
        trainability = [(p, p.stop_gradient) for p in named_parameters(model).values()]
        attachment = Attachment.create(model, config, quiet=quiet)
        attachment.attach()
        self.model = model
        self.base_fingerprint: str | None = None
        self._trainability = trainability
        self._adapters: dict[str, Attachment] = {DEFAULT_ADAPTER: attachment}
        self._active = DEFAULT_ADAPTER
        self._restored = False
        # The model's own, so that its signature shows: PaddleNLP's Trainer chooses columns by it.
        self.forward = model.forward
        self.mark_only_lora_as_trainable()

    @property
    def lora_config(self) -> LoRAConfig:
        """The options of the active adapter."""
        return self._attachment.config

    @property
    def merged(self) -> bool:
        """Whether the active adapter is merged into the weights."""
        return self._attachment.merged

    def mark_only_lora_as_trainable(self) -> None:
        """Freezes everything but the active adapter: A, B, and what its configuration names
        besides.
        """
        freeze_all_but(self.model, self._attachment.extras)

    def get_trainable_state_dict(
        self, concat_init_lora: bool = False
    ) -> OrderedDict[str, paddle.Tensor]:
        """What belongs to the active adapter, by name without a prefix for this wrapper: A, B and
        whole tensors.

        Independent of whether the adapter is merged or disabled at the moment.

        Args:
            concat_init_lora: the file format of LoRA-GA, which is not supported.

        Raises:
            AdapterError: ``concat_init_lora`` is on.
        """
        if concat_init_lora:
            raise AdapterError(
                "concat_init_lora is the file format of LoRA-GA, which is not supported",
                hint="leave it out",
            )
        kept = self._attachment.extra_values()
        state: OrderedDict[str, paddle.Tensor] = OrderedDict()
        for name, parameter in self.model.state_dict().items():
            if name in kept:
                in_place = not (self.merged or self._attachment.disabled)
                state[name] = parameter if in_place else to_tensor(kept[name])
            elif is_branch(name) or not parameter.stop_gradient:
                state[name] = parameter
        return state

    def set_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Loads weights of the adapter, of the base model, or both; a merged adapter is merged
        again afterwards.

        Args:
            state_dict: tensors or arrays by name, with or without this wrapper's prefix
                ``model.``.
            args: ignored, for the signature of ``nn.Layer``.
            kwargs: ignored, too.

        Returns:
            The names of the base model that were not given, and an empty list: as ``nn.Layer``
            does.

        Raises:
            AdapterError: unknown names, other shapes, or some but not all of the adapter's
                tensors.
        """
        merged = self.merged
        self.unmerge()
        missing = load_state(self._attachment, state_dict)
        if merged:
            self.merge()
        return missing, []

    def merge(self) -> None:
        """Adds the active adapter to the weights, all layers or none; a second call does nothing.

        Accumulated in float32 and rounded once, whatever the type of the weights.

        Raises:
            AdapterError: LoRA is disabled, a weight is shared with another layer, or a sum is not
                finite.
        """
        self._attachment.merge()

    def unmerge(self) -> None:
        """Takes the adapter out of the weights again, exact to the bit; a second call does
        nothing.
        """
        self._attachment.unmerge()

    def disable_lora(self) -> None:
        """Makes the model compute what it computed before LoRA; a merged adapter is unmerged."""
        self._attachment.disable()

    def enable_lora(self) -> None:
        """Makes the adapter count again, unmerged."""
        self._attachment.enable()

    def restore_original_model(self) -> nn.Layer:
        """The very model that was passed in, as it was: its layers, bits, and what was trainable.

        This wrapper cannot be used afterwards.
        """
        self._attachment.detach()
        for parameter, stop_gradient in self._trainability:
            parameter.stop_gradient = stop_gradient
        self._restored = True
        return self.model

    def train(self, mode: bool = True) -> LoRAModel:
        """Training mode; with the deprecated ``merge_weights``, unmerges."""
        super().train(mode)
        if mode and self.lora_config.merge_weights:
            self.unmerge()
        return self

    def eval(self) -> LoRAModel:
        """Evaluation mode; with the deprecated ``merge_weights``, merges."""
        super().eval()
        if self.lora_config.merge_weights and not self._attachment.disabled:
            self.merge()
        return self

    def _convert_tensor_parallel(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's part of a whole adapter; PaddleNLP's Trainer calls it to resume."""
        return split(self._attachment, state_dict)

    @property
    def _attachment(self) -> Attachment:
        if self._restored:
            raise AdapterError(
                "restore_original_model() has taken the adapters out of this model",
                hint="wrap the model again",
            )
        return self._adapters[self._active]


def _in_order(first: Any, second: Any) -> tuple[nn.Layer, LoRAConfig]:
    """Model and configuration, whichever came first."""
    model, config = (second, first) if isinstance(first, LoRAConfig) else (first, second)
    if not isinstance(model, nn.Layer) or not isinstance(config, LoRAConfig):
        raise LoRAConfigTypeError(
            "LoRAModel takes a paddle.nn.Layer and a LoRAConfig, "
            f"not a {type(first).__name__} and a {type(second).__name__}"
        )
    return model, config


def _refuse_wrapped(model: nn.Layer) -> None:
    if isinstance(model, LoRAModel):
        raise AdapterError(
            "the model is a LoRAModel already",
            hint="use load_adapter() for a second adapter, or restore_original_model() first",
        )
    if isinstance(model, paddle.distributed.fleet.meta_parallel.PipelineLayer):
        raise AdapterError(f"{type(model).__name__} is a pipeline model, which is not supported")
