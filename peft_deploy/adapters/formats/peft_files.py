"""The files of Hugging Face PEFT's LoRA folders, under their own names.

torch's layers keep their weights the other way round, so PEFT's lora_A is [R, in] and its lora_B [out, R]; an
embedding's are [R, rows] and [columns, R]. Transposed, they are the A and B of Paddle's layout, to the bit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peft_deploy.adapters.formats.peft_config import (
    PEFT_CONFIG_NAME,
    PeftLoraConfig,
    parse_lora_config,
    read_peft_json,
)
from peft_deploy.adapters.formats.state_file import read_state
from peft_deploy.errors import AdapterError, listed
from peft_deploy.weights.lora import LoraPair
from peft_deploy.weights.source import Array

PEFT_WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_NAME = "adapter_model.bin"
PREFIX = "base_model.model."
_HALF = re.compile(r"(.+)\.(?:lora_([AB])\.weight|lora_embedding_([AB]))")
# Tensors of variants, by a part of their names; the configuration names most of these features too.
_FOREIGN = {
    ".lora_magnitude_vector": "DoRA",
    ".lora_B.bias": "a bias beside lora_B",
    ".token_adapter.": "trainable tokens",
    ".trainable_tokens_": "trainable tokens",
    ".experts.": "LoRA in mixtures of experts",
}


@dataclass(frozen=True)
class PeftLora:
    """A PEFT LoRA adapter under Hugging Face's names.

    Args:
        path: the folder.
        config: its options.
        pairs: module → A [in, R], B [R, out] and scaling, in Paddle's layout already.
        embeddings: those of the modules that are embeddings.
        tensors: parameter → the tensor that takes its place, as it is in the file.
    """

    path: Path
    config: PeftLoraConfig
    pairs: Mapping[str, LoraPair]
    embeddings: frozenset[str]
    tensors: Mapping[str, Array]


def read_peft_lora(path: Path) -> PeftLora:
    """Reads a PEFT LoRA folder by itself, without knowing the base model.

    Raises:
        AdapterError: no such adapter, one that cannot be represented, or a damaged one.
    """
    path = Path(path)
    config = parse_lora_config(read_peft_json(path), path)
    state = _own_names(read_state(peft_weights(path)), path)
    halves: dict[str, dict[str, Array]] = {}
    embeddings: set[str] = set()
    tensors: dict[str, Array] = {}
    for name, array in state.items():
        half = _HALF.fullmatch(name)
        if half is None:
            tensors[name.replace(".base_layer.", ".")] = array
            continue
        halves.setdefault(half[1], {})[half[2] or half[3]] = array
        if half[3]:
            embeddings.add(half[1])
    _refuse_foreign(tensors, path)
    _check_saved(config, tensors, path)
    pairs = {m: _pair(m, found, config, path) for m, found in halves.items()}
    _check_pairs(pairs, embeddings, config, path)
    return PeftLora(path, config, pairs, frozenset(embeddings), tensors)


def peft_weights(folder: Path) -> Path:
    """The file of weights of a PEFT folder.

    Raises:
        AdapterError: there is none, or only a pickle of torch.
    """
    file = folder / PEFT_WEIGHTS_NAME
    if file.is_file():
        return file
    if (folder / PICKLED_NAME).is_file():
        raise AdapterError(
            f"{folder} holds {PICKLED_NAME}, a pickle of torch, which can run code when it is read; "
            f"{PEFT_WEIGHTS_NAME} is needed",
            hint="save it with PEFT again: save_pretrained(…, safe_serialization=True)",
        )
    raise AdapterError(f"{folder} has {PEFT_CONFIG_NAME}, but no {PEFT_WEIGHTS_NAME}")


def _own_names(state: Mapping[str, Array], where: Path) -> dict[str, Array]:
    strange = [name for name in state if not name.startswith(PREFIX)]
    if strange:
        raise AdapterError(
            f"{where}: names in PEFT's files begin with {PREFIX}; these do not:\n{listed(strange)}"
        )
    return {name.removeprefix(PREFIX): array for name, array in state.items()}


def _refuse_foreign(tensors: Mapping[str, Array], where: Path) -> None:
    for part, feature in _FOREIGN.items():
        found = [name for name in tensors if part in name]
        if found:
            raise AdapterError(
                f"{where} uses {feature}, which cannot be represented:\n{listed(found)}"
            )
    biases = [name for name in tensors if name.endswith(".bias")]
    if biases:
        raise AdapterError(
            f"{where} holds trained biases, which cannot be represented:\n{listed(biases)}"
        )
    unknown = [name for name in tensors if ".lora_" in name or not name.endswith(".weight")]
    if unknown:
        raise AdapterError(f"{where} holds tensors whose meaning is not known:\n{listed(unknown)}")


def _check_saved(config: PeftLoraConfig, tensors: Mapping[str, Array], where: Path) -> None:
    saved = [name.rpartition(".")[0] for name in tensors]
    absent = [end for end in config.modules_to_save if not any(m.endswith(end) for m in saved)]
    if absent:
        raise AdapterError(
            f"{where} has modules_to_save without a tensor in the file:\n{listed(absent)}"
        )


def _pair(
    module: str, found: Mapping[str, Array], config: PeftLoraConfig, where: Path
) -> LoraPair:
    if len(found) < 2:
        raise AdapterError(f"{where}: {module} has only one of lora_A and lora_B")
    A, B = found["A"], found["B"]
    shapes = f"{where}: {module} has lora_A {list(A.shape)} and lora_B {list(B.shape)}"
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        raise AdapterError(f"{shapes}; [R, in] and [out, R] are needed")
    if A.shape[0] != config.rank_of(module):
        raise AdapterError(
            f"{shapes}, of rank {A.shape[0]}; r and rank_pattern in {PEFT_CONFIG_NAME} give it "
            f"{config.rank_of(module)}",
            hint="the configuration and the weights come from different runs",
        )
    return LoraPair(A.T, B.T, config.scaling_of(module))


def _check_pairs(
    pairs: Mapping[str, LoraPair], embeddings: set[str], config: PeftLoraConfig, where: Path
) -> None:
    if not pairs:
        raise AdapterError(f"{where} holds no lora_A and lora_B at all")
    types = {array.dtype.name for pair in pairs.values() for array in (pair.A, pair.B)}
    if len(types) > 1:
        raise AdapterError(
            f"{where} mixes the element types {', '.join(sorted(types))} in lora_A and lora_B"
        )
    idle = [m for m in pairs if m not in embeddings and not config.is_target(m)]
    if idle:
        raise AdapterError(
            f"{where} holds LoRA for modules that its {PEFT_CONFIG_NAME} does not target, so that PEFT would "
            f"ignore it:\n{listed(idle)}",
            hint="the configuration and the weights come from different runs",
        )
