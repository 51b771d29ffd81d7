"""A model that no family knows, as something to export: a layer in memory, or PaddleNLP's model in a folder.

Needs Paddle. Such a model is held in memory as a whole: nothing is known of it that would allow less.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paddle import nn

from peft_deploy.adapters.arrays import to_array
from peft_deploy.adapters.formats import Adapter
from peft_deploy.adapters.lora import LoRAModel
from peft_deploy.adapters.lora.trainable import is_branch
from peft_deploy.adapters.lora.views import adapter_of, base_value, is_disabled, merged_value
from peft_deploy.base import BaseModel
from peft_deploy.base.folder import CONFIG, companions_in
from peft_deploy.config.export import ExportOptions
from peft_deploy.config.json_file import read_object
from peft_deploy.config.layer_signature import LayerSignature
from peft_deploy.config.precision import FP32
from peft_deploy.errors import AdapterError, CheckpointError, ConfigError, UnsupportedModelError
from peft_deploy.families import find_family
from peft_deploy.progress import Progress
from peft_deploy.trace.layer import weights_of
from peft_deploy.weights import Array, TensorInfo, fingerprint
from peft_deploy.workflows.sources import Adapters, given_adapters


@dataclass(frozen=True)
class LayerSource:
    """A layer to be exported.

    Args:
        layer: in memory, or a LoRA model around it; only read.
        signature: its inputs and outputs.
        name: of the base model, for the manifest.
        adapter_name: of the adapter, likewise.
        companions: files that go into the bundle.
    """

    layer: nn.Layer
    signature: LayerSignature
    name: str = ""
    adapter_name: str = "default"
    companions: Sequence[Path] = field(default_factory=list)

    @property
    def adapted(self) -> LoRAModel | None:
        """The LoRA model, if it is one."""
        return self.layer if isinstance(self.layer, LoRAModel) else None

    @property
    def inner(self) -> nn.Layer:
        """The layer without the wrapper."""
        return self.layer.model if isinstance(self.layer, LoRAModel) else self.layer

    @property
    def adapter(self) -> Adapter | None:
        """The active adapter, if any.

        Raises:
            AdapterError: it is disabled, so that there is nothing to merge.
        """
        if self.adapted is None:
            return None
        if is_disabled(self.adapted):
            raise AdapterError(
                "the model's adapter is disabled", hint="call enable_lora(), or export model.model"
            )
        return adapter_of(self.adapted)

    def base_fingerprint(self) -> str:
        """Identifies the weights without any adapter."""
        names = [name for name in weights_of(self.inner) if not is_branch(name)]
        return fingerprint(LayerTensors(self, names, merged=False))


class LayerTensors:
    """A layer's parameters and buffers as a :class:`~peft_deploy.weights.TensorSource`.

    Args:
        source: the layer.
        names: of those to give.
        merged: with the adapter in them.
    """

    def __init__(self, source: LayerSource, names: Sequence[str], *, merged: bool) -> None:
        self._adapted = source.adapted
        self._weights = weights_of(source.inner)
        self._parameters = {name for name, _ in source.inner.named_parameters()}
        self._names = list(names)
        self._read = merged_value if merged else base_value

    def names(self) -> Sequence[str]:
        """Structured names."""
        return self._names

    def info(self, name: str) -> TensorInfo:
        """Type and shape of a tensor."""
        tensor = self._weights[name]
        return TensorInfo(name, str(tensor.dtype).rpartition(".")[2], tuple(tensor.shape))

    def read(self, name: str) -> Array:
        """A copy of the tensor."""
        if self._adapted is None or name not in self._parameters:
            return to_array(self._weights[name])
        return self._read(self._adapted, name)


def claimed_as(base: str | Path | BaseModel | nn.Layer) -> str | None:
    """PaddleNLP's class of a model that some family knows after all; None for any other.

    Args:
        base: as for :func:`layer_source`.
    """
    if isinstance(base, nn.Layer):
        inner = base.model if isinstance(base, LoRAModel) else base
        config: dict[str, Any] = {"architectures": [type(inner).__name__]}
    else:
        folder = base.path if isinstance(base, BaseModel) else Path(base).expanduser()
        path = folder / CONFIG
        config = read_object(path, CheckpointError) if path.is_file() else {}
    try:
        return find_family(config).paddle_model(config)
    except UnsupportedModelError:
        return None


def layer_source(
    base: str | Path | BaseModel | nn.Layer,
    signature: LayerSignature | str | Path | dict[str, Any],
    adapter: Adapters,
    tokenizer: str | Path | None,
    progress: Progress,
) -> LayerSource:
    """What is to be exported.

    Args:
        base: a layer, a LoRA model around one, or a folder with a model of PaddleNLP's.
        signature: inputs and outputs, or a file that says them.
        adapter: a LoRA adapter's folder, for a model in a folder.
        tokenizer: a folder with tokenizer files, for a layer.
        progress: gets a phase for loading.

    Raises:
        ConfigError: the signature cannot be read, or arguments that do not go together.
        CheckpointError, AdapterError, UnsupportedModelError: what is wrong with the folders.
    """
    said = layer_signature(signature)
    if known := claimed_as(base):
        warnings.warn(
            f"{known} is a model that is known, and --signature exports it by its own forward all the same: without a "
            "cache and what belongs to it, and checked with random inputs only; leave --signature out unless it "
            "is that what you want",
            stacklevel=4,
        )
    given = given_adapters(adapter)
    if isinstance(base, nn.Layer):
        if given:
            raise ConfigError(
                "a model in memory brings its own adapter; give a folder as base to add one"
            )
        if tokenizer is not None and not Path(tokenizer).is_dir():
            raise ConfigError(f"the tokenizer folder {tokenizer} does not exist")
        companions = [] if tokenizer is None else companions_in(Path(tokenizer))
        return LayerSource(base, said, companions=companions)
    from peft_deploy.workflows.unclaimed import load_unclaimed

    folder = base.path if isinstance(base, BaseModel) else Path(base).expanduser()
    layer, name = load_unclaimed(folder, given, progress)
    return LayerSource(layer, said, folder.resolve().name, name, companions_in(folder))


def check_layer_options(
    options: ExportOptions, adapter: Adapters, base: str | Path | BaseModel | nn.Layer
) -> None:
    """Passes when the options can be had for a model that no family knows.

    Args:
        options: of the export.
        adapter: as for :func:`layer_source`.
        base: likewise.

    Raises:
        ConfigError: one needs to know the model, or an adapter is not to be merged.
    """
    needing = {
        "--adapter-bank": options.adapter_bank is not None,
        "--adapters runtime": options.keeps_adapters,
        "--prefix-slots": options.prefix_slots,
        "--last-logits": options.last_logits,
        f"--precision {options.precision}": options.precision != FP32,
        "--cases": options.cases is not None,
        "--record-reference": options.record_reference,
        "--validate-layers": options.validate_layers is not None,
        "--pooling": options.pooling is not None,
    }
    for option, wanted in needing.items():
        if wanted:
            raise ConfigError(
                f"{option} needs to know the model, and --signature is for models that no family knows",
                hint=f"leave --signature out: {known} is known"
                if (known := claimed_as(base))
                else "leave it out; what such a model can have is --merge, --format, --fuse, --opset and --report",
            )
    if given_adapters(adapter) and not options.merge:
        raise ConfigError(
            "an adapter was given without saying what to do with it", hint="add --merge"
        )


def plan_layer(source: LayerSource) -> list[str]:
    """What an export would do, a sentence each."""
    weights = weights_of(source.inner)
    plan = [f"{type(source.inner).__name__}: {len(weights)} tensors, exported by its own forward"]
    adapter = source.adapter
    if adapter is not None:
        plan.append(
            f"adapter {source.adapter_name}: LoRA of rank {adapter.config.r} on {len(adapter.pairs)} layers"
        )
    said = ", ".join(f"{spec.name} {list(spec.dims)}" for spec in source.signature.inputs)
    plan.append(f"inputs {said}; outputs {', '.join(source.signature.outputs)}")
    return plan


def layer_signature(given: LayerSignature | str | Path | dict[str, Any]) -> LayerSignature:
    """A signature given as such, as the contents of its file, or as the file.

    Raises:
        ConfigError: it cannot be read, or says something that cannot be.
    """
    if isinstance(given, LayerSignature):
        return given
    if isinstance(given, dict):
        return LayerSignature.from_dict(given)
    path = Path(given).expanduser()
    if not path.is_file():
        raise ConfigError(f"the signature {path} is no file")
    return LayerSignature.read(path)
