"""LoRA adapters that stay apart from a bundle's weights: what gets slots, and the files that fill them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peft_deploy.adapters import Adapter
from peft_deploy.adapters.formats.onnx_adapter import onnx_tensors
from peft_deploy.adapters.formats.onnx_file import MAX_BYTES, model_version, write_onnx_adapter
from peft_deploy.adapters.formats.peft_writer import huggingface_modules, refuse_unmergeable
from peft_deploy.atomic_folder import disk_errors
from peft_deploy.bundle import MODEL
from peft_deploy.bundle.adapter_bank import BANK_FILE, single_name, stack_adapters
from peft_deploy.bundle.adapter_files import adapter_path
from peft_deploy.bundle.folder import BundleFolder
from peft_deploy.bundle.slots import read_slots
from peft_deploy.config.export import ALL_LINEAR, ExportOptions
from peft_deploy.config.matching import match_pattern
from peft_deploy.errors import AdapterError, ConfigError, listed, nearest
from peft_deploy.weights.source import Array
from peft_deploy.workflows.sources import EXPORT_DTYPE, ExportSource, NamedAdapter

if TYPE_CHECKING:
    from peft_deploy.convert.linears import Selection

_MERGE = "export it merged: peft-deploy export --merge"


def check_keepable(adapter: Adapter, source: ExportSource, slot_rank: int | None = None) -> None:
    """Passes when slots of LoRA can hold everything that the adapter changes, as far as the graph does not matter.

    Args:
        adapter: one that is kept apart.
        source: the model.
        slot_rank: the rank of all slots; None where they take any.

    Raises:
        AdapterError: it replaces whole parameters, is relative to other weights than the base's own, does not fit
            the base model, or has a rank above that of the slots.
    """
    refuse_unmergeable(adapter)
    rank = max((pair.rank for pair in adapter.pairs.values()), default=0)
    if slot_rank is not None and rank > slot_rank:
        raise AdapterError(
            f"{adapter.path} has rank {rank}, and slots of rank {slot_rank} were asked for",
            hint=f"--slot-rank {rank}, or leave it out for slots of any rank",
        )
    if adapter.replacements:
        raise AdapterError(
            f"{adapter.path} replaces whole parameters, which slots for LoRA cannot take:\n"
            + listed(adapter.replacements),
            hint=_MERGE,
        )
    shared = {**source.family.tied(source.config)}
    shared |= {target: name for name, target in shared.items()}
    for module in adapter.pairs:
        if f"{module}.weight" in shared:
            raise AdapterError(
                f"{adapter.path} changes {module}, whose weight is that of {shared[f'{module}.weight']} too; "
                "such a layer cannot have slots",
                hint="untie the two (tie_word_embeddings false, both stored)",
            )
    adapter.merge_into(source.tensors, EXPORT_DTYPE)  # compares names and shapes, looks for NaN


def select_layers(source: ExportSource, options: ExportOptions) -> Selection:
    """Which of a graph's linear layers get slots.

    Args:
        source: the model and the adapters that are kept.
        options: of the export.

    Returns:
        A function from the linear layers that the graph has to those that get slots; it raises AdapterError when an
        adapter changes something else, ConfigError when the expression for layers matches none.
    """
    names = source.family.names(source.config)
    targets = {
        named.name: [hf for hf, _ in huggingface_modules(named.adapter, names).values()]
        for named in source.kept
    }

    def select(linears: Sequence[str]) -> list[str]:
        for named in source.kept:
            _require_linears(named, targets[named.name], linears)
        wanted = {module for modules in targets.values() for module in modules}
        wanted |= set(_others(options.slots or ("" if wanted else ALL_LINEAR), linears))
        return [module for module in linears if module in wanted]

    return select


def planned_slots(source: ExportSource, options: ExportOptions) -> list[str]:
    """The layers that :func:`select_layers` would choose of those that are linear by their names.

    Raises:
        AdapterError, ConfigError: see there.
    """
    names = source.family.names(source.config)
    linears = []
    for parameter in source.tensors.names():
        mapped = names.to_huggingface(parameter)
        if (
            mapped is not None
            and mapped.is_linear
            and len(source.tensors.info(parameter).shape) == 2
        ):
            linears.append(mapped.name.removesuffix(".weight"))
    return list(select_layers(source, options)(linears))


def _require_linears(named: NamedAdapter, modules: Sequence[str], linears: Sequence[str]) -> None:
    others = set(modules) - set(linears)
    if others:
        raise AdapterError(
            f"{named.adapter.path} changes modules that are no plain linear layers of the graph, so that there are no "
            f"slots for them:\n{listed(others)}",
            hint=_MERGE,
        )


def _others(slots: str, linears: Sequence[str]) -> list[str]:
    from peft_deploy.convert.linears import in_numbered_layers

    if not slots:
        return []
    found = in_numbered_layers(linears) if slots == ALL_LINEAR else match_pattern(slots, linears)
    if not found:
        last = sorted({module.rpartition(".")[2] for module in linears})
        close = nearest(slots.rpartition(".")[2], last) or last[:8]
        raise ConfigError(
            f"--slots {slots} matches none of the {len(linears)} linear layers",
            hint=f"for instance {', '.join(close)}, or {ALL_LINEAR}",
        )
    return found


def check_bank(source: ExportSource, capacity: int | None) -> None:
    """Passes when the adapters that are kept fit into the bank.

    Args:
        source: the model and the adapters.
        capacity: of the bank; None without one.

    Raises:
        ConfigError: they are more.
    """
    if capacity is not None and len(source.kept) > capacity:
        names = ", ".join(named.name for named in source.kept)
        raise ConfigError(
            f"{len(source.kept)} adapters were given ({names}) for a bank of {capacity}",
            hint=f"--adapter-bank {len(source.kept)}, or more",
        )


def write_kept(
    folder: BundleFolder, source: ExportSource, graph: Mapping[str, Any], fingerprint: str
) -> dict[str, Any]:
    """Writes ``adapters/NAME.onnx_adapter`` for every adapter that is kept, and for a bank all of them in one file.

    Args:
        folder: of the bundle.
        source: the model and the adapters.
        graph: what the manifest says of the graph, its slots among it.
        fingerprint: of the base model.

    Returns:
        What the manifest says of the graph, with the bank's file in it.

    Raises:
        AdapterError: a rank above that of the slots, or values too large for their type.
        OutputError: a file cannot be written.
    """
    version = model_version(fingerprint)
    adapters: dict[str, dict[str, Array]] = {}
    for named in source.kept:
        tensors = kept_tensors(named.adapter, source, graph["lora_slots"])
        path = adapter_path(folder.path, named.name)
        with disk_errors(folder.output):
            path.parent.mkdir(exist_ok=True)
        write_onnx_adapter(path, tensors, version)
        if "adapter_bank" in graph:
            adapters[named.name] = tensors
    bank = _write_bank(folder, adapters, version) if adapters else {}
    return {**graph, "adapter_bank": {**graph["adapter_bank"], **bank}} if bank else dict(graph)


def _write_bank(
    folder: BundleFolder, adapters: Mapping[str, Mapping[str, Array]], version: int
) -> dict[str, Any]:
    """All adapters stacked; returns the file's name, and under which id each of them is in it."""
    stacked = stack_adapters(read_slots(folder.path / MODEL), list(adapters.values()))
    size = sum(array.nbytes for array in stacked.values())
    if size > MAX_BYTES:
        warnings.warn(
            f"all adapters in one file would be {size:,} bytes, more than such a file can hold; {BANK_FILE}, which "
            "only other runtimes need, is left out",
            stacklevel=5,
        )
        return {}
    write_onnx_adapter(folder.path / BANK_FILE, stacked, version)
    return {"file": BANK_FILE, "ids": {name: i for i, name in enumerate(adapters, 1)}}


def kept_tensors(
    adapter: Adapter, source: ExportSource, slots: Mapping[str, Any]
) -> dict[str, Array]:
    """What the file of an adapter holds: slot → value.

    Args:
        adapter: one that is kept.
        source: the model.
        slots: what the manifest says of the graph's slots.
    """
    rank = slots["rank"]
    ranks = {} if rank is None else dict.fromkeys(slots["targets"], rank)
    names = source.family.names(source.config)
    own = [single_name(slot) for slot in slots["names"]]
    return onnx_tensors(adapter, names, slots["dtype"], ranks, own)
