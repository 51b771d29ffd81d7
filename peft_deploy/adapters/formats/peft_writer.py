"""Writes an adapter as a Hugging Face PEFT LoRA folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_deploy.adapters.formats.adapter import Adapter
from peft_deploy.adapters.formats.peft_config import LORA, PEFT_CONFIG_NAME
from peft_deploy.adapters.formats.peft_files import PEFT_WEIGHTS_NAME, PREFIX
from peft_deploy.adapters.formats.uniform import alpha_for, refuse_both
from peft_deploy.config.json_file import make_folder, write_json
from peft_deploy.errors import AdapterError, listed
from peft_deploy.families.names import NameMap
from peft_deploy.weights.lora import LoraPair
from peft_deploy.weights.source import Array, TensorInfo
from peft_deploy.weights.writer import write_safetensors


class ArraySource:
    """Arrays in memory as a :class:`~peft_deploy.weights.source.TensorSource`."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self._arrays = arrays

    def names(self) -> Sequence[str]:
        """The names, as given."""
        return list(self._arrays)

    def info(self, name: str) -> TensorInfo:
        """Type and shape of one array."""
        array = self._arrays[name]
        return TensorInfo(name, array.dtype.name, tuple(int(n) for n in array.shape))

    def read(self, name: str) -> Array:
        """The array itself."""
        return self._arrays[name]


def write_peft(
    folder: Path,
    adapter: Adapter,
    names: NameMap,
    *,
    num_layers: int | None = None,
    tied: Mapping[str, str] | None = None,
    task: str | None = None,
) -> Path:
    """Writes a folder that PEFT loads; A and B keep every bit, ranks and scalings stand in the configuration.

    Args:
        folder: made when it is missing; each file appears whole or not at all.
        adapter: what to write.
        names: of the base model's family.
        num_layers: L of the base model; where it is known, target_modules can be short.
        tied: PaddleNLP parameter → the one whose storage it shares in this base model.
        task: PEFT's name of what the base model does, such as ``CAUSAL_LM``.

    Returns:
        The file of weights.

    Raises:
        AdapterError: something that PEFT's format cannot represent; it is named, and nothing is written.
        OutputError: the folder cannot be written.
    """
    refuse_unmergeable(adapter)
    refuse_both(adapter.pairs, adapter.replacements, adapter.path)
    modules = huggingface_modules(adapter, names)
    kept = _kept_as_they_are(adapter, names)
    saved = _saved(adapter, names, tied or {})
    state: dict[str, Array] = {}
    for module, (name, embedding) in modules.items():
        pair = adapter.pairs[module]
        half, end = ("lora_embedding_", "") if embedding else ("lora_", ".weight")
        state[f"{PREFIX}{name}.{half}A{end}"] = pair.A.T  # [R, in]
        state[f"{PREFIX}{name}.{half}B{end}"] = pair.B.T  # [out, R]
    state |= {f"{PREFIX}{name}": array for name, array in saved.items()}
    pairs = {name: adapter.pairs[module] for module, (name, _) in modules.items()}
    config = {
        "task_type": task,
        **_ranks_and_alphas(adapter, pairs),
        "target_modules": _targets(pairs, names, num_layers),
        "modules_to_save": [name.removesuffix(".weight") for name in saved] or None,
        "fan_in_fan_out": kept,
        "lora_dropout": adapter.config.lora_dropout,
        "base_model_name_or_path": adapter.config.base_model_name_or_path,
    }
    target = make_folder(folder) / PEFT_WEIGHTS_NAME
    write_safetensors(target, ArraySource(state), {"format": "pt"})
    write_json(folder / PEFT_CONFIG_NAME, {**_FIXED, **config})
    if adapter.provenance is not None:
        adapter.provenance.save(folder)
    return target


_FIXED: dict[str, Any] = {
    "peft_type": LORA,
    "auto_mapping": None,
    "revision": None,
    "inference_mode": True,
    "init_lora_weights": True,
    "fan_in_fan_out": False,
    "bias": "none",
    "layers_to_transform": None,
    "layers_pattern": None,
    "use_dora": False,
}


def refuse_unmergeable(adapter: Adapter) -> None:
    """Passes when A · B is the change of the base model's own weights.

    Raises:
        AdapterError: a PiSSA adapter, whose A · B is relative to what PiSSA leaves of them.
    """
    if adapter.config.pissa:
        raise AdapterError(
            f"{adapter.path} is a PiSSA adapter: its A · B is no change of the base model's own weights, "
            "which is what other formats mean by it",
            hint="merge it: peft-deploy merge --base DIR --adapter DIR --output DIR",
        )


def _kept_as_they_are(adapter: Adapter, names: NameMap) -> bool:
    """Whether Hugging Face's models keep the adapted linear layers as [in, out].

    Raises:
        AdapterError: modules that these models have only as part of others, or that they are parts of.
    """
    mapped = {module: names.to_huggingface(f"{module}.weight") for module in adapter.pairs}
    without = [module for module, found in mapped.items() if found and found.paddle_only]
    if without:
        raise AdapterError(
            f"{adapter.path} adapts modules that Hugging Face's models fuse or split:\n{listed(without)}",
            hint="merge the adapter into the base model instead",
        )
    return any(found.conv1d for found in mapped.values() if found)


def huggingface_modules(adapter: Adapter, names: NameMap) -> dict[str, tuple[str, bool]]:
    """For each adapted module Hugging Face's name, and whether it is an embedding.

    Raises:
        AdapterError: modules that the family's map does not have.
    """
    mapped = {module: names.to_huggingface(f"{module}.weight") for module in adapter.pairs}
    unknown = [module for module, found in mapped.items() if found is None]
    if unknown:
        raise AdapterError(
            f"{adapter.path} adapts modules that have no name in Hugging Face's models of this family:\n"
            f"{listed(unknown)}",
            hint="is it an adapter of another model?",
        )
    return {
        module: (found.name.removesuffix(".weight"), not found.is_linear)
        for module, found in mapped.items()
        if found is not None
    }


def _saved(adapter: Adapter, names: NameMap, tied: Mapping[str, str]) -> dict[str, Array]:
    """The replaced parameters under Hugging Face's names, in torch's layout."""
    shared = {*tied, *tied.values()}
    saved, problems = {}, []
    for name, array in adapter.replacements.items():
        mapped = names.to_huggingface(name)
        if name.endswith(".bias"):
            problems.append(f"{name}: a trained bias")
        elif mapped is None:
            problems.append(f"{name}: no name in Hugging Face's models of this family")
        elif name in shared:
            problems.append(f"{name}: shares its storage, of which PEFT would train a copy")
        else:
            saved[mapped.name] = array.T if mapped.transpose else array
    if problems:
        raise AdapterError(
            f"{adapter.path} replaces parameters that PEFT's format cannot represent:\n{listed(problems)}",
            hint="merge the adapter into the base model instead",
        )
    return saved


def _ranks_and_alphas(adapter: Adapter, pairs: Mapping[str, LoraPair]) -> dict[str, Any]:
    """The options that give each module its rank and its scaling; ``pairs`` has Hugging Face's names."""
    kinds = Counter((pair.rank, pair.scaling) for pair in pairs.values())
    (rank, scaling), _ = kinds.most_common(1)[0] if kinds else ((8, 1.0), 0)
    own = adapter.config
    if len(kinds) == 1 and (rank, scaling) == (own.r, own.scaling):
        alpha, rslora = own.lora_alpha, own.rslora
    else:
        alpha, rslora = alpha_for(scaling, rank), False
    alphas = {name: alpha_for(pair.scaling, pair.rank) for name, pair in pairs.items()}
    return {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "rank_pattern": {name: pair.rank for name, pair in pairs.items() if pair.rank != rank},
        "alpha_pattern": {}
        if len(kinds) == 1
        else {n: a for n, a in alphas.items() if a != alpha},
    }


def _targets(pairs: Mapping[str, LoraPair], names: NameMap, num_layers: int | None) -> list[str]:
    """Last parts of the names where they mean exactly these modules, otherwise whole names."""
    short = {name.rpartition(".")[2] for name in pairs}
    if num_layers is not None:
        templates = [rule.huggingface.removesuffix(".weight") for rule in names.rules]
        modules = {m for t in templates for m in names.indexed(t, num_layers)}
        if {m for m in modules if m.rpartition(".")[2] in short} == set(pairs):
            return sorted(short)
    return sorted(pairs)
