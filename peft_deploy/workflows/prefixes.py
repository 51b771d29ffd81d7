"""Prefix adapters on their way into a bundle: read, compared with the base model, evaluated once, written."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_deploy.adapters.formats.detect import AdapterFormat, Method, detect
from peft_deploy.adapters.formats.onnx_file import model_version, write_onnx_adapter
from peft_deploy.adapters.formats.peft_prefix import read_peft_prefix
from peft_deploy.adapters.formats.prefix import PrefixAdapter, read_prefix
from peft_deploy.adapters.provenance import ROUNDING, WeightSample
from peft_deploy.atomic_folder import disk_errors
from peft_deploy.base import BaseModel
from peft_deploy.bundle.adapter_files import adapter_path
from peft_deploy.bundle.folder import BundleFolder
from peft_deploy.bundle.prefixes import Prefix, check_prefix, prefix_path, write_prefix_file
from peft_deploy.errors import AdapterError, ConfigError, listed
from peft_deploy.families import DecoderFamily, Family, past_rule_of
from peft_deploy.signature import POSITION_IDS, GraphSignature
from peft_deploy.weights import cast_array
from peft_deploy.workflows.sources import EXPORT_DTYPE, ExportSource, name_and_path

METHOD = "prefix"


@dataclass(frozen=True)
class NamedPrefix:
    """A prefix adapter, and what becomes of it in the bundle.

    Args:
        name: what it goes by.
        adapter: as it was trained.
        format: that it was read from; it decides what positions the prefix was trained with.
        prefix: its keys and values in the graph's element type.
    """

    name: str
    adapter: PrefixAdapter
    format: AdapterFormat
    prefix: Prefix

    def entry(self, *, slots: bool) -> dict[str, Any]:
        """What the bundle's manifest says of it."""
        return {
            "name": self.name,
            "method": METHOD,
            "mode": METHOD,
            "tokens": self.prefix.num_tokens,
            "position_offset": self.prefix.position_offset,
            "projection": self.adapter.config.prefix_projection,
            "slots": slots,
            "fingerprint": self.adapter.fingerprint,
        }


def is_prefix(text: str) -> bool:
    """Whether an adapter given as ``FOLDER`` or ``NAME=FOLDER`` is a prefix.

    Raises:
        AdapterError: it is not there, or no adapter.
    """
    return detect(name_and_path(text)[1])[1] is Method.PREFIX


def check_takes_prefixes(source: ExportSource) -> None:
    """Passes when the model has a cache, before which a prefix can stand.

    Raises:
        ConfigError: it has none.
    """
    if not source.family.signature(source.config, EXPORT_DTYPE).past:
        raise ConfigError(
            f"prefix slots were asked for, and a {source.family.model_type} model has no cache that could begin "
            "with a prefix",
            hint="leave --prefix-slots out; only decoders take prefixes",
        )


def split_prefixes(
    adapters: Sequence[str], base: BaseModel
) -> tuple[list[str], list[NamedPrefix]]:
    """The adapters that are no prefixes as they were given, and the prefixes.

    Args:
        adapters: each ``FOLDER`` or ``NAME=FOLDER``.
        base: the base model.

    Raises:
        AdapterError: one is not there, or :func:`read_named_prefix` refuses it.
        ConfigError: a name that no file can have.
    """
    others, prefixes = [], []
    for text in adapters:
        name, path = name_and_path(text)
        format, method = detect(path)
        if method is Method.PREFIX:
            prefixes.append(read_named_prefix(name, path, format, base))
        else:
            others.append(text)
    return others, prefixes


def read_named_prefix(
    name: str, path: Path, format: AdapterFormat, base: BaseModel
) -> NamedPrefix:
    """A prefix adapter for a base model.

    Args:
        name: what it is to go by.
        path: its folder.
        format: of the folder: PaddleNLP's or PEFT's.
        base: the base model.

    Raises:
        AdapterError: it cannot be read, does not fit the base model, leaves no room for a text, or nobody knows how
            the base model takes a prefix.
    """
    hf = format is AdapterFormat.HF
    adapter = read_peft_prefix(path, base.dims) if hf else read_prefix(path)
    prefix = evaluate_prefix(name, adapter, format, base.family, base.config)
    _compare_base(base, adapter)
    return NamedPrefix(name, adapter, format, prefix)


def evaluate_prefix(
    name: str,
    adapter: PrefixAdapter,
    format: AdapterFormat,
    family: Family,
    config: Mapping[str, Any],
) -> Prefix:
    """The keys and values of a prefix adapter, as bundles hold them.

    Args:
        name: what the prefix is to go by.
        adapter: as it was trained.
        format: that it was read from.
        family: of the base model.
        config: the base model's config.json.

    Raises:
        AdapterError: it does not fit the base model, leaves no room for a text, or nobody knows how the base model
            takes a prefix.
    """
    path, model_class = adapter.path, family.paddle_model(config)
    if not isinstance(family, DecoderFamily):
        raise AdapterError(
            f"{path} is a prefix, and a {model_class} is no decoder: it has no cache that could begin with one"
        )
    signature = family.signature(config, EXPORT_DTYPE)
    past = {
        name: cast_array(array, EXPORT_DTYPE, name=name)
        for name, array in adapter.named_past().items()
    }
    check_prefix(past, signature, str(path), family.dims(config).max_positions)
    moves = POSITION_IDS in signature.input_names and _moves_positions(
        family, config, path, format
    )
    return Prefix(name, past, adapter.num_tokens if moves else 0)


def _moves_positions(
    family: Family, config: Mapping[str, Any], path: Path, format: AdapterFormat
) -> bool:
    """Whether the positions of a text begin behind the prefix in the library that trained it.

    PEFT leaves positions to the model, and those of transformers count them from the length of their cache;
    PaddleNLP's models each have their own rule.
    """
    if format is AdapterFormat.HF:
        return True
    rule = past_rule_of(family, config)
    if rule is None:
        raise AdapterError(
            f"{path}: whether a prefix moves the positions of PaddleNLP's {family.paddle_model(config)} is not "
            "known, so it cannot be exported"
        )
    return rule.positions_after_past


def _compare_base(base: BaseModel, adapter: PrefixAdapter) -> None:
    """Warns when the base model is not the one that the prefix was trained on, as far as its folder says."""
    provenance = adapter.provenance
    if provenance is None or provenance.base_fingerprint == base.fingerprint:
        return
    known, tied = set(base.tensors.names()), base.tensors.tied
    other = []
    for name, sample in provenance.base_weights.items():
        stored = tied.get(name, name)
        if stored not in known:
            other.append(name)
            continue
        now = WeightSample.of(base.tensors.read(stored))
        unit = ROUNDING.get(sample.dtype, 0.0) + ROUNDING.get(now.dtype, 0.0)
        if len(now.values) != len(sample.values) or any(
            abs(a - b) > unit * abs(a) + 1e-12
            for a, b in zip(sample.values, now.values, strict=True)
        ):
            other.append(name)
    if other:
        warnings.warn(
            f"{base.path} is not the base model that the prefix {adapter.path} was trained on; "
            "these weights differ:\n" + listed(other),
            stacklevel=3,
        )


def write_prefixes(
    folder: BundleFolder,
    prefixes: Sequence[NamedPrefix],
    signature: GraphSignature,
    base_fingerprint: str,
    *,
    slots: bool,
) -> None:
    """Writes every prefix, as a cache and, for a graph with prefix slots, as an adapter file.

    Args:
        folder: of the bundle.
        prefixes: from :func:`read_named_prefix`.
        signature: of the graph.
        base_fingerprint: of the base model.
        slots: whether the graph has prefix slots.

    Raises:
        OutputError: one cannot be written.
    """
    for named in prefixes:
        path = prefix_path(folder.path, named.name)
        with disk_errors(folder.output):
            path.parent.mkdir(exist_ok=True)
        prefix = named.prefix.in_type(signature.past[0].dtype)
        write_prefix_file(path, prefix, base_fingerprint)
        if slots:
            tensors = prefix.slots(positions=POSITION_IDS in signature.input_names)
            target = adapter_path(folder.path, named.name)
            write_onnx_adapter(target, tensors, model_version(base_fingerprint))


def prefix_entries(adapters: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The prefixes among a manifest's adapters."""
    return [entry for entry in adapters if entry.get("method") == METHOD]
