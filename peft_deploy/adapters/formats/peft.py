"""A Hugging Face PEFT LoRA folder as an adapter of PaddleNLP's model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from peft_deploy.adapters.formats.adapter import Adapter
from peft_deploy.adapters.formats.peft_config import PEFT_CONFIG_NAME
from peft_deploy.adapters.formats.peft_files import PeftLora, read_peft_lora
from peft_deploy.adapters.formats.uniform import adapter_of_pairs
from peft_deploy.adapters.provenance import Provenance
from peft_deploy.config import LoRAConfig
from peft_deploy.errors import AdapterError, listed
from peft_deploy.families.names import NameMap
from peft_deploy.weights.lora import LoraPair
from peft_deploy.weights.source import Array


def read_peft(
    path: Path,
    names: NameMap,
    *,
    num_layers: int | None = None,
    tied: Mapping[str, str] | None = None,
) -> Adapter:
    """Reads a PEFT LoRA folder as an adapter of PaddleNLP's model.

    Args:
        path: the folder.
        names: of the base model's family.
        num_layers: L of the base model; the deepest adapted layer's when None.
        tied: PaddleNLP parameter → the one whose storage it shares in this base model.

    Returns:
        The adapter. Each of its ``pairs`` has the rank and the scaling that the folder says; ``config`` and
        ``state`` are those of :mod:`~peft_deploy.adapters.formats.uniform` where they differ.

    Raises:
        AdapterError: no such adapter, one that cannot be represented, a damaged one, or one of another model.
    """
    peft = read_peft_lora(path)
    pairs = _map_pairs(peft, names)
    _check_complete(peft, names, num_layers)
    replacements = _map_tensors(peft, names)
    _refuse_tied(replacements, tied or {}, peft.path)
    config = peft.config
    declared = LoRAConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        rslora=config.use_rslora,
        lora_dropout=config.lora_dropout,
        base_model_name_or_path=config.base_name,
    )
    return adapter_of_pairs(
        peft.path,
        pairs,
        replacements,
        num_layers=num_layers,
        declared=declared,
        provenance=Provenance.load(peft.path),
    )


def _map_pairs(peft: PeftLora, names: NameMap) -> dict[str, LoraPair]:
    mapped = {module: names.to_paddle(f"{module}.weight") for module in peft.pairs}
    parts = {module: names.parts(f"{module}.weight") for module in peft.pairs}
    unknown = [
        m for m, found in mapped.items() if not parts[m] and (found is None or found.paddle_only)
    ]
    if unknown:
        raise AdapterError(
            f"{peft.path} adapts modules that the base model's family does not have:\n{listed(unknown)}",
            hint="is it an adapter of another model?",
        )
    pairs, wrong = {}, []
    for module, found in mapped.items():
        if (found is None or found.is_linear) == (module in peft.embeddings):
            wrong.append(module)
            continue
        blocks = {found.name: peft.pairs[module]} if found else {}
        for name, pair in (blocks or _split(peft.pairs[module], parts[module])).items():
            pairs[name.removesuffix(".weight")] = pair
    if wrong:
        raise AdapterError(
            f"{peft.path} adapts as a linear layer what is an embedding, or the reverse:\n{listed(wrong)}"
        )
    return pairs


def _split(pair: LoraPair, parts: tuple[str, ...]) -> dict[str, LoraPair]:
    """One pair for each of the blocks of columns that a fused layer's output consists of; they share A."""
    if pair.B.shape[1] % len(parts):
        raise AdapterError(
            f"lora_B gives {pair.B.shape[1]} outputs, which do not divide into {', '.join(parts)}"
        )
    blocks = np.split(pair.B, len(parts), axis=1)
    return {part: replace(pair, B=B) for part, B in zip(parts, blocks, strict=True)}


def _check_complete(peft: PeftLora, names: NameMap, num_layers: int | None) -> None:
    """PEFT leaves a target unchanged that the file does not hold; it is the file that is damaged then."""
    known = {module for module in peft.pairs if module not in peft.embeddings}
    indices = [int(part) for module in known for part in module.split(".") if part.isdigit()]
    layers = num_layers or max(indices, default=-1) + 1
    templates = names.linear_layers()
    modules = {m for t in templates for m in names.indexed(t, max(layers, 1))}
    missing = [m for m in modules - known if peft.config.is_target(m)]
    if missing:
        raise AdapterError(
            f"{peft.path}: {PEFT_CONFIG_NAME} targets modules that the file does not hold:\n{listed(missing)}",
            hint="the configuration and the weights come from different runs",
        )


def _map_tensors(peft: PeftLora, names: NameMap) -> dict[str, Array]:
    replacements, unknown = {}, []
    for name, array in peft.tensors.items():
        mapped = names.to_paddle(name)
        if mapped is None or (mapped.transpose and array.ndim != 2):
            unknown.append(name)
        else:
            replacements[mapped.name] = array.T if mapped.transpose else array
    if unknown:
        raise AdapterError(
            f"{peft.path} saves tensors (modules_to_save) that the base model's family does not have:\n"
            f"{listed(unknown)}"
        )
    return replacements


def _refuse_tied(replacements: Mapping[str, Array], tied: Mapping[str, str], where: Path) -> None:
    """PEFT trains a copy of a shared matrix; in PaddleNLP the other use of it would change too."""
    shared = {**tied, **{target: name for name, target in tied.items()}}
    alone = [name for name in replacements if name in shared and shared[name] not in replacements]
    if alone:
        raise AdapterError(
            f"{where} replaces one of two parameters that share their storage in the base model:\n"
            f"{listed(alone)}",
            hint="untie the two in the base model (tie_word_embeddings false, both stored)",
        )
