"""What packed linear layers are called in a graph."""

from __future__ import annotations

from collections.abc import Sequence

from peft_deploy.families import NameMap, PackedLinear
from peft_deploy.families.packing import WEIGHT


def graph_parameters(groups: Sequence[PackedLinear], names: NameMap) -> dict[str, str]:
    """Packed parameter → its name in the graph: beside its first part, by Hugging Face's names."""
    return {
        tensor: f"{_module(group, names)}.{tensor.rpartition('.')[2]}"
        for group in groups
        for tensor in group.tensors
    }


def graph_modules(groups: Sequence[PackedLinear], names: NameMap) -> dict[str, list[str]]:
    """Packed layer → the layers in it, in the order of their columns, by Hugging Face's names; for the manifest."""
    return {
        _module(group, names): [_part(part, names) for part in group.parts] for group in groups
    }


def _module(group: PackedLinear, names: NameMap) -> str:
    parent = _part(group.parts[0], names).rpartition(".")[0]
    return f"{parent}.{group.module.rpartition('.')[2]}"


def _part(part: str, names: NameMap) -> str:
    mapped = names.to_huggingface(part + WEIGHT)
    return (mapped.name if mapped else part + WEIGHT).removesuffix(WEIGHT)
