"""Where a model to be exported comes from: folders on disk, or a model in memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_deploy.adapters.formats import Adapter
from peft_deploy.adapters.formats.detect import AdapterFormat, detect, read_lora
from peft_deploy.base import BaseModel, open_base
from peft_deploy.errors import ConfigError
from peft_deploy.families import Family, describe_unread, unread_entries
from peft_deploy.progress import Progress
from peft_deploy.weights import (
    AdapterTensors,
    Importance,
    MergedTensors,
    RoundingLoss,
    SubsetTensors,
    TensorSource,
)
from peft_deploy.workflows.lineage import check_lineage

if TYPE_CHECKING:
    from paddle import nn

    from peft_deploy.workflows.prefixes import NamedPrefix


Mismatch = tuple[str, str]  # what is wrong with an adapter that was given, and a hint
Adapters = str | Path | Sequence[str | Path] | None
MEMORY = "memory"  # the layout of a model that is in no file
EXPORT_DTYPE = "float32"  # of the weights and the arithmetic in a bundle


@dataclass(frozen=True)
class NamedAdapter:
    """An adapter and the name it goes by in the bundle."""

    name: str
    adapter: Adapter


@dataclass(frozen=True)
class ExportSource:
    """Everything that an export needs to know of a model and its adapter.

    Args:
        name: of the base model, for messages and the manifest.
        config: the base model's config.json.
        family: the base model's family.
        tensors: the base model's weights, in PaddleNLP's names and layout.
        layout: of the checkpoint they come from: ``huggingface``, ``paddlenlp`` or ``memory``.
        fingerprint: identifies the base model's weights; computed when called.
        adapter: to be merged, if any.
        companions: tokenizer and generation files that go into the bundle.
        prefixes: that the bundle gets beside its weights.
        check: fails when the weights are not those of a model with these parameters and shapes.
        load_reference: gives the model in the dynamic graph, the adapter that is merged active and not merged;
            none of those that are kept.
        load_adapted: gives it with one of those that are kept active.
        kept: LoRA adapters that stay apart from the weights.
        importance: of the inputs of linear layers, where scales are chosen by it.
    """

    name: str
    config: Mapping[str, Any]
    family: Family
    tensors: TensorSource
    layout: str
    fingerprint: Callable[[], str]
    adapter: NamedAdapter | None
    check: Callable[[Mapping[str, tuple[int, ...]]], None]
    load_reference: Callable[[Progress], nn.Layer]
    load_adapted: Callable[[Progress, NamedAdapter], nn.Layer]
    companions: list[Path] = field(default_factory=list)
    prefixes: tuple[NamedPrefix, ...] = ()
    kept: tuple[NamedAdapter, ...] = ()
    importance: Importance | None = None

    @property
    def unread(self) -> dict[str, Any]:
        """Entries of config.json that may mean something and that nobody reads.

        What a model in memory computes does not depend on what else its configuration says.
        """
        return {} if self.layout == MEMORY else unread_entries(self.family, self.config)

    @property
    def limits_of_check(self) -> list[str]:
        """What no check of the bundle can show, a sentence each."""
        return describe_unread(self.unread, self.family.paddle_model(self.config))

    def merged(
        self, dtype: str, losses: MutableMapping[str, RoundingLoss] | None = None
    ) -> TensorSource:
        """The weights of the bundle, computed as they are read.

        Args:
            dtype: of the weights.
            losses: gets what rounding loses of every change, once its parameter is read.

        Raises:
            AdapterError: the adapter does not fit the base model.
        """
        unused = self.family.unused(self.config)
        if self.adapter is None:
            merged = MergedTensors(self.tensors, AdapterTensors({}, {}), dtype)
        else:
            merged = self.adapter.adapter.merge_into(self.tensors, dtype, losses, sampled=True)
        return SubsetTensors(merged, unused) if unused else merged


def from_folders(
    base: str | Path | BaseModel, adapter: Adapters, *, keep: bool = False
) -> ExportSource:
    """A base model and adapters on disk.

    Args:
        base: the base model's folder, or a name that PaddleNLP can download.
        adapter: the adapter's folder, ``NAME=FOLDER`` to name it in the bundle, or several of them:
            prefixes, and LoRA of which one can be merged; none to export the base alone.
        keep: keep LoRA apart from the weights, any number of adapters.

    Raises:
        CheckpointError, AdapterError, UnsupportedModelError: what is wrong with either, or the base model holds
            the adapter already.
        ConfigError: two adapters of one name, or two that would be merged.
    """
    from peft_deploy.workflows.prefixes import split_prefixes

    model = base if isinstance(base, BaseModel) else open_base(base)
    model.check_names()
    loras, prefixes = split_prefixes(given_adapters(adapter), model)
    if len(loras) > 1 and not keep:
        raise ConfigError(
            f"{len(loras)} LoRA adapters were given; one can be merged into a base model",
            hint="keep them apart from the weights: --adapters runtime",
        )
    read = [read_named(text, model) for text in loras]
    for named in read:
        check_lineage(model, named.adapter)
    check_unique([*(named.name for named in read), *(prefix.name for prefix in prefixes)])
    merged = None if keep or not read else read[0]

    def load(progress: Progress, active: NamedAdapter | None) -> nn.Layer:
        from peft_deploy.base.dygraph import load_model

        layer = load_model(model, progress=progress)
        return layer if active is None else _with_adapter(layer, active.adapter)

    return ExportSource(
        name=model.name,
        config=model.config,
        family=model.family,
        tensors=model.tensors,
        layout=model.tensors.layout,
        fingerprint=lambda: model.fingerprint,
        adapter=merged,
        check=model.check,
        load_reference=lambda progress: load(progress, merged),
        load_adapted=load,
        companions=model.companions(),
        prefixes=tuple(prefixes),
        kept=tuple(read) if keep else (),
    )


def _with_adapter(layer: nn.Layer, adapter: Adapter) -> nn.Layer:
    from peft_deploy.adapters.lora import LoRAModel

    if detect(adapter.path)[0] is not AdapterFormat.PADDLE:
        return with_adapter_read(layer, adapter)
    adapted = LoRAModel.from_pretrained(layer, adapter.path)
    adapted.eval()
    return adapted


def with_adapter_read(layer: nn.Layer, adapter: Adapter) -> nn.Layer:
    """A model with an adapter as it was read, in the form that PaddleNLP's format would have, in float32."""
    from peft_deploy.adapters.lora import LoRAModel

    adapted = LoRAModel(layer, replace(adapter.config, dtype=EXPORT_DTYPE))
    adapted.set_state_dict(adapter.state)
    adapted.eval()
    return adapted


def read_named(text: str, base: BaseModel) -> NamedAdapter:
    """The adapter in a folder, given as ``FOLDER`` or ``NAME=FOLDER``; PaddleNLP's, PEFT's or an .onnx_adapter file.

    Args:
        text: what was given.
        base: the base model, which gives tensors of other formats their names.

    Raises:
        AdapterError: it cannot be read.
        ConfigError: the name has characters that a file name should not have.
    """
    name, path = name_and_path(text)
    adapter = read_lora(
        path,
        base.names,
        num_layers=base.dims.num_layers,
        tied=base.tensors.tied,
        model_config=base.config,
    )
    return NamedAdapter(name, adapter)


def given_adapters(adapter: Adapters) -> list[str]:
    """What was given for adapters, as a list."""
    if adapter is None:
        return []
    return [str(adapter)] if isinstance(adapter, str | Path) else [str(a) for a in adapter]


def name_and_path(text: str) -> tuple[str, Path]:
    """An adapter given as ``FOLDER`` or ``NAME=FOLDER``, its name made of the folder's where none was given.

    Raises:
        ConfigError: the name has characters that a file name should not have.
    """
    name, separator, folder = text.partition("=")
    if not separator or Path(text).exists():
        name, folder = "", text
    path = Path(folder).expanduser()
    # A name that was not asked for must not be a reason to refuse a folder.
    name = name or re.sub(r"[^\w.-]+", "-", path.resolve().name).strip("-.") or "default"
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise ConfigError(f"the adapter name {name!r} may hold only letters, digits and . _ -")
    return name, path


def check_unique(names: Sequence[str]) -> None:
    """Passes when no two adapters go by one name.

    Raises:
        ConfigError: two do.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"two adapters are called {twice[0]!r}", hint="name them: --adapter NAME=DIR"
        )
