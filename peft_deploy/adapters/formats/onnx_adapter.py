"""``.onnx_adapter`` files: the tensors that onnxruntime puts in place of a graph's LoRA slots.

A is [in, R], B is [R, out] and holds the scaling; both have the graph's element type. The names are those of the
graph's slots, ``model.layers.0.self_attn.q_proj.lora_A.weight``. Where layers that read the same input share an A, see
:mod:`~peft_deploy.adapters.formats.joint_lora`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from peft_deploy.adapters.formats.adapter import Adapter
from peft_deploy.adapters.formats.joint_lora import join, separate
from peft_deploy.adapters.formats.onnx_file import OnnxAdapterFile, read_onnx_file
from peft_deploy.adapters.formats.peft_writer import huggingface_modules, refuse_unmergeable
from peft_deploy.adapters.formats.uniform import adapter_of_pairs, pad_rank
from peft_deploy.errors import AdapterError, CheckpointError, listed
from peft_deploy.families.names import NameMap
from peft_deploy.signature import BANK_A, BANK_B, LORA_A, LORA_B, PREFIX_KEY_TEMPLATE
from peft_deploy.weights.cast import cast_array
from peft_deploy.weights.lora import LoraPair
from peft_deploy.weights.source import Array

# Ours and Olive's converter; with ".MatMul", onnxruntime-genai's builder and Olive's extraction.
_NAME = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.MatMul)?\.weight")
_QUANTIZED = re.compile(r".*\.quant\.(?:weight|scale|zero_point)")
# What genai's builder calls a block of a layer, and Hugging Face's name of it.
_BLOCKS = {".attn.": ".self_attn."}


def slot_names(huggingface_module: str) -> tuple[str, str]:
    """The names of a module's A and B in graphs and in files."""
    return huggingface_module + LORA_A, huggingface_module + LORA_B


def onnx_tensors(
    adapter: Adapter,
    names: NameMap,
    dtype: str,
    ranks: Mapping[str, int] | None = None,
    slots: Collection[str] = (),
) -> dict[str, Array]:
    """What a file holds of an adapter: A and scaling · B by slot names, each element rounded once.

    Args:
        adapter: any.
        names: of the base model's family.
        dtype: the graph's.
        ranks: module → the rank of its slots, for graphs whose slots have a fixed one; filled up with zeros.
        slots: of the graph, where they are known; a module that has some is a linear layer, and As stand side by side
            where they are one slot. Otherwise every module has its own.

    Raises:
        AdapterError: something that slots cannot represent, a rank that is too large, or values that are
            too large for the type.
    """
    refuse_unmergeable(adapter)
    if adapter.replacements:
        raise AdapterError(
            f"{adapter.path} replaces whole parameters, which slots for LoRA cannot take:\n"
            + listed(adapter.replacements),
            hint="export it merged: peft-deploy export --merge",
        )
    result: dict[str, Array] = {}
    modules = huggingface_modules(adapter, names)
    embeddings = [n for n, odd in modules.values() if odd and slot_names(n)[1] not in slots]
    if embeddings:
        raise AdapterError(
            f"{adapter.path} adapts embeddings; slots for LoRA are those of linear layers:\n{listed(embeddings)}",
            hint="export it merged: peft-deploy export --merge",
        )
    for module, (name, _) in modules.items():
        pair, (slot_A, slot_B) = adapter.pairs[module], slot_names(name)
        rank = (ranks or {}).get(name, pair.rank)
        if rank < pair.rank:
            raise AdapterError(
                f"{adapter.path}: {name} has rank {pair.rank}, its slot takes {rank}"
            )
        pair = pad_rank(pair, rank)
        try:
            result[slot_A] = cast_array(pair.A, dtype, name=slot_A)
            scaled = pair.B.astype(np.float64) * pair.scaling
            result[slot_B] = cast_array(scaled, dtype, name=f"scaling · {slot_B}")
        except CheckpointError as exc:
            raise AdapterError(f"{adapter.path}: {exc.message}", hint=exc.hint) from exc
    return join(result, slots, str(adapter.path))


def read_onnx_adapter(path: Path, names: NameMap, *, num_layers: int | None = None) -> Adapter:
    """Reads a file as an adapter of PaddleNLP's model; the scaling is in its B, so that it is 1.

    Args:
        path: the file.
        names: of the base model's family; names that Olive or onnxruntime-genai give are understood too.
        num_layers: L of the base model, where it is known.

    Raises:
        AdapterError: as :func:`read_onnx_file`; names that are no slots, half a pair, shapes that do not fit.
    """
    file = read_onnx_file(Path(path))
    if PREFIX_KEY_TEMPLATE % 0 in file.tensors:
        raise AdapterError(
            f"{path} holds the keys and values of a prefix for the slots of a graph; no adapter can be made of it",
            hint="give the folder that the prefix was trained into",
        )
    by_module = onnx_pairs(file)
    pairs: dict[str, LoraPair] = {}
    unknown = []
    for module, pair in by_module.items():
        mapped = names.to_paddle(f"{_own_name(module, names)}.weight")
        own = None if mapped is None else mapped.name.removesuffix(".weight")
        if own is None or own in pairs:
            unknown.append(module)
        else:
            pairs[own] = pair
    if unknown:
        raise AdapterError(
            f"{path} holds LoRA for modules that the base model's family does not have, or has once only:\n"
            f"{listed(unknown)}",
            hint="is it an adapter of another model?",
        )
    return adapter_of_pairs(file.path, pairs, {}, num_layers=num_layers)


def onnx_pairs(file: OnnxAdapterFile) -> dict[str, LoraPair]:
    """The pairs of a file by the module names that it uses; scaling 1.

    Raises:
        AdapterError: names that are no slots of LoRA or of a whole bank, half a pair, or two matrices that do not fit.
    """
    refuse_bank(file)
    quantized = [name for name in file.tensors if _QUANTIZED.fullmatch(name)]
    if quantized:
        raise AdapterError(
            f"{file.path} holds quantized LoRA, which cannot be read:\n{listed(quantized)}"
        )
    halves: dict[str, dict[str, Array]] = {}
    strange = []
    for name, array in separate(file.tensors, str(file.path)).items():
        match = _NAME.fullmatch(name)
        if match is None or match[2] in halves.setdefault(match[1], {}):
            strange.append(name)
        else:
            halves[match[1]][match[2]] = array
    if strange:
        raise AdapterError(f"{file.path} holds parameters that are no LoRA:\n{listed(strange)}")
    alone = [f"{m}.lora_{half}" for m, found in halves.items() if len(found) < 2 for half in found]
    if alone:
        raise AdapterError(
            f"{file.path}: one half of the pair is missing beside:\n{listed(alone)}"
        )
    if not halves:
        raise AdapterError(f"{file.path} holds no lora_A and lora_B at all")
    try:
        return {module: LoraPair(found["A"], found["B"], 1.0) for module, found in halves.items()}
    except AdapterError as exc:
        raise AdapterError(f"{file.path}: {exc.message}") from exc


def refuse_bank(file: OnnxAdapterFile) -> None:
    """Passes when a file is that of one adapter.

    Raises:
        AdapterError: it holds several, stacked for a bank.
    """
    if any(name.endswith((BANK_A, BANK_B)) for name in file.tensors):
        raise AdapterError(
            f"{file.path} holds all adapters of a bank at once, for runtimes that cannot stack them",
            hint="the single ones lie beside it, in the folder adapters",
        )


def _own_name(module: str, names: NameMap) -> str:
    if names.to_paddle(f"{module}.weight") is not None:
        return module
    for theirs, ours in _BLOCKS.items():
        renamed = module.replace(theirs, ours)
        if names.to_paddle(f"{renamed}.weight") is not None:
            return renamed
    return module
