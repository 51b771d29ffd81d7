"""What an adapter is converted for: a base model, known from its folder or from a bundle of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peft_deploy.adapters import Adapter
from peft_deploy.adapters.formats.prefix import PrefixAdapter
from peft_deploy.base import BaseModel, open_base
from peft_deploy.base.folder import CONFIG
from peft_deploy.bundle import MODEL, Manifest
from peft_deploy.bundle.adapter_bank import adapter_slots
from peft_deploy.bundle.slots import Slot, read_slots
from peft_deploy.config.json_file import read_object
from peft_deploy.errors import AdapterError, BundleError, CheckpointError, ConfigError, listed
from peft_deploy.families import Family, ModelDims, NameMap, find_family
from peft_deploy.weights import TensorSource


@dataclass(frozen=True)
class AdapterTarget:
    """The base model that an adapter belongs to.

    Args:
        path: what it is known from.
        config: its config.json.
        family: that claims it.
        fingerprint: identifies its weights; computed when called.
        tensors: its weights, when they are at hand.
        bundle: the bundle's folder, when it was named.
    """

    path: Path
    config: Mapping[str, Any]
    family: Family
    fingerprint: Callable[[], str]
    tensors: TensorSource | None = None
    bundle: Path | None = None

    @property
    def dims(self) -> ModelDims:
        """Its sizes."""
        return self.family.dims(self.config)

    @property
    def names(self) -> NameMap:
        """Hugging Face's names of its tensors and PaddleNLP's."""
        return self.family.names(self.config)

    @property
    def tied(self) -> Mapping[str, str]:
        """Parameter → the one whose storage it shares."""
        return self.family.tied(self.config)

    @cached_property
    def slots(self) -> dict[str, Slot]:
        """The bundle's slots for adapters; none without a bundle.

        Raises:
            AdapterError: the bundle has none.
        """
        if self.bundle is None:
            return {}
        slots = adapter_slots(read_slots(self.bundle / MODEL))
        if not slots:
            raise AdapterError(
                f"the graph of {self.bundle} has no slots for adapters: its weights are merged, or the base's own"
            )
        return slots

    def check(self, adapter: Adapter) -> None:
        """Passes when the adapter's modules are the base model's and have its shapes.

        Raises:
            AdapterError: they are not, as far as the weights are at hand.
        """
        if self.tensors is None:
            return
        tensors, known = self.tensors, set(self.tensors.names()) | set(self.tied)
        shapes: dict[str, tuple[int, ...]] = {
            f"{module}.weight": pair.shape for module, pair in adapter.pairs.items()
        }
        shapes |= {name: array.shape for name, array in adapter.replacements.items()}
        wrong = [
            f"{name}: the base model does not have it" for name in shapes if name not in known
        ]
        for name, shape in shapes.items():
            if name in self.tensors.names() and tensors.info(name).shape != tuple(shape):
                own = list(tensors.info(name).shape)
                wrong.append(f"{name}: {list(shape)} by the adapter, {own} in the base model")
        if wrong:
            raise AdapterError(
                f"{adapter.path} does not fit {self.path}:\n{listed(wrong)}",
                hint="is it an adapter of another model?",
            )

    def check_prefix(self, prefix: PrefixAdapter) -> None:
        """Passes when the prefix has the base model's layers, heads and head size.

        Raises:
            AdapterError: it has not.
        """
        dims = self.dims
        own = (dims.num_layers, dims.num_kv_heads, dims.head_dim)
        found = (prefix.num_layers, prefix.num_kv_heads, prefix.head_dim)
        if own != found:
            raise AdapterError(
                f"{prefix.path} does not fit {self.path}: it has {found[0]} layers with {found[1]} key and value "
                f"heads of {found[2]}, the base model has {own[0]}, {own[1]} and {own[2]}",
                hint="is it a prefix of another model?",
            )


def find_target(base: str | Path | None, bundle: str | Path | None) -> AdapterTarget:
    """The base model in a folder, that of a bundle, or both, which then have to be the same.

    Raises:
        ConfigError: neither is given.
        CheckpointError, BundleError: one cannot be read, or they are two models.
    """
    if base is None and bundle is None:
        raise ConfigError(
            "the names of an adapter's tensors depend on the base model",
            hint="give its folder with --base, or a bundle of it with --for",
        )
    model = None if base is None else open_base(base)
    if bundle is None:
        assert model is not None
        return _of_base(model)
    folder = Path(bundle).expanduser()
    manifest = Manifest.read(folder)
    recorded = str(manifest.base.get("fingerprint") or "")
    if model is not None:
        if recorded != model.fingerprint:
            raise CheckpointError(
                f"{folder} was made of the base model {manifest.base.get('name')} with fingerprint "
                f"{recorded[:12]}; {model.path} has {model.fingerprint[:12]}"
            )
        return AdapterTarget(
            folder, model.config, model.family, lambda: recorded, model.tensors, folder
        )
    config = read_object(folder / CONFIG, BundleError)
    return AdapterTarget(folder, config, find_family(config), lambda: recorded, bundle=folder)


def _of_base(model: BaseModel) -> AdapterTarget:
    return AdapterTarget(
        model.path, model.config, model.family, lambda: model.fingerprint, model.tensors
    )
