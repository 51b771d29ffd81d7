"""A PaddleNLP model in memory, with or without LoRA, as something to export. Needs Paddle."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from paddle import nn

from peft_deploy.adapters.lora import LoRAModel
from peft_deploy.adapters.lora.views import adapter_of, base_value, is_disabled
from peft_deploy.base.folder import companions_in
from peft_deploy.base.pooling import with_pooling
from peft_deploy.errors import AdapterError, ConfigError
from peft_deploy.families import Family, find_family
from peft_deploy.families.standins.parameters import unique_parameters
from peft_deploy.weights import Array, TensorInfo, fingerprint
from peft_deploy.workflows.sources import MEMORY, ExportSource, NamedAdapter


class MemoryTensors:
    """The base model's parameters as a :class:`~peft_deploy.weights.TensorSource`.

    Args:
        model: the base model, LoRA layers in it or not.
        read: gives a parameter as it is without any adapter.
        skipped: names of parameters that belong to the adapter.
        tied: parameter → the one whose storage it shares.
    """

    def __init__(
        self,
        model: nn.Layer,
        read: Callable[[str, Any], Array],
        skipped: Callable[[str], bool],
        tied: dict[str, str],
    ) -> None:
        parameters = unique_parameters(model)
        self._parameters = {n: p for n, p in parameters.items() if not skipped(n)}
        self._read = read
        self.tied = tied

    def names(self) -> Sequence[str]:
        """Structured parameter names."""
        return list(self._parameters)

    def info(self, name: str) -> TensorInfo:
        """Type and shape of a parameter."""
        parameter = self._parameters[name]
        return TensorInfo(name, str(parameter.dtype).rpartition(".")[2], tuple(parameter.shape))

    def read(self, name: str) -> Array:
        """A copy of the parameter, without any adapter."""
        return self._read(name, self._parameters[name])


def from_memory(
    model: nn.Layer, tokenizer: Path | None, *, keep: bool = False, pooling: str | None = None
) -> ExportSource:
    """A PaddleNLP model or a LoRA model around one; it is only read.

    Args:
        model: of a registered family.
        tokenizer: a folder with tokenizer files for the bundle, and perhaps those of sentence-transformers.
        pooling: of sentence embeddings, as for :func:`~peft_deploy.base.open_base`.
        keep: keep the LoRA model's adapter apart from the weights.

    Raises:
        ConfigError: the model has no PaddleNLP configuration.
        AdapterError: its adapter is disabled, so that there is nothing to merge.
        UnsupportedModelError: no family claims it.
    """
    adapted = model if isinstance(model, LoRAModel) else None
    inner = model.model if adapted else model
    if not hasattr(getattr(inner, "config", None), "to_dict"):
        raise ConfigError(
            f"a {type(inner).__name__} has no PaddleNLP configuration; "
            "export takes PaddleNLP models and LoRAModels around them"
        )
    if adapted is not None and is_disabled(adapted):
        raise AdapterError(
            "the model's adapter is disabled", hint="call enable_lora(), or export model.model"
        )
    config = {**inner.config.to_dict(), "architectures": [type(inner).__name__]}
    config = with_pooling(find_family(config), config, tokenizer, pooling)
    family = find_family(config)
    config = _as_tied_as_it_is(config, family, inner)
    family.paddle_arguments(config)
    tied = dict(family.tied(config))
    tensors = _tensors(inner, adapted, tied)
    if tokenizer is not None and not tokenizer.is_dir():
        raise ConfigError(f"the tokenizer folder {tokenizer} does not exist")

    named = None if adapted is None else NamedAdapter("default", adapter_of(adapted))

    def load(active: NamedAdapter | None) -> nn.Layer:
        if adapted is None or (active is not None and not adapted.merged):
            return model
        twin = copy.deepcopy(adapted)
        twin.unmerge()
        if active is not None:
            return twin
        twin.disable_lora()
        return twin.model

    return ExportSource(
        name=type(inner).__name__,
        config=config,
        family=family,
        tensors=tensors,
        layout=MEMORY,
        fingerprint=lambda: fingerprint(tensors),
        adapter=None if keep else named,
        check=lambda _expected: None,  # they are the model's own
        load_reference=lambda _progress: load(None if keep else named),
        load_adapted=lambda _progress, active: load(active),
        kept=(named,) if keep and named is not None else (),
        companions=[] if tokenizer is None else companions_in(tokenizer),
    )


def _as_tied_as_it_is(config: dict[str, Any], family: Family, inner: nn.Layer) -> dict[str, Any]:
    """The configuration with what the model itself does: a default may say "tied" where the class never ties."""
    parameters = dict(inner.named_parameters(remove_duplicate=False))
    tied = family.tied(config).items()
    apart = any(n in parameters and parameters[n] is not parameters.get(t) for n, t in tied)
    return {**config, "tie_word_embeddings": False} if apart else config


def _tensors(inner: nn.Layer, adapted: LoRAModel | None, tied: dict[str, str]) -> MemoryTensors:
    from peft_deploy.adapters.arrays import to_array
    from peft_deploy.adapters.lora.trainable import is_branch

    if adapted is None:
        return MemoryTensors(inner, lambda _name, p: to_array(p), lambda _name: False, tied)
    return MemoryTensors(inner, lambda name, _p: base_value(adapted, name), is_branch, tied)
