"""From the files of tensor-parallel ranks to an ordinary adapter folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft_deploy.adapters.formats.paddlenlp import write_adapter
from peft_deploy.adapters.formats.pairs import build_pairs
from peft_deploy.adapters.formats.state_file import read_state
from peft_deploy.adapters.provenance import Provenance
from peft_deploy.atomic_folder import AtomicFolder, FolderKind, check_output
from peft_deploy.base.folder import CONFIG
from peft_deploy.config import LORA_CONFIG_NAME, LoRAConfig
from peft_deploy.errors import AdapterError, CheckpointError, listed
from peft_deploy.families import find_family, parallel_axes
from peft_deploy.weights.tensor_parallel import merge_shards

_ADAPTER = FolderKind("adapter", LORA_CONFIG_NAME)
_PREFIX_CONFIG = "prefix_config.json"
_SINGLE_RANK = -1  # what the reference writes after merging
_RANK_FILE = re.compile(r"lora_model?_state\.tp(\d+)\.pdparams")


@dataclass(frozen=True)
class MergedShards:
    """What merging the ranks of an adapter wrote.

    Args:
        output: the adapter's folder.
        degree: number of ranks that were merged.
        modules: how many modules the adapter changes.
        replaced: how many parameters it replaces.
        spread: how many tensors were put together; all others were the same on all ranks.
    """

    output: Path
    degree: int
    modules: int
    replaced: int
    spread: int


def merge_adapter_shards(
    folder: str | Path, output: str | Path, *, config: str | Path | None = None
) -> MergedShards:
    """Writes the adapter that the ranks of a tensor-parallel training hold together.

    Args:
        folder: with ``lora_config.json`` and ``lora_model_state.tp00.pdparams``, ``….tp01.pdparams``, ….
        output: the adapter's folder; must not exist yet, or be empty.
        config: config.json of the base model, or its folder; the one in ``folder`` when not given.

    Raises:
        AdapterError: files of ranks missing, of different checkpoints, or of something that cannot be merged.
        OutputError: the output cannot be written.
    """
    folder, output = Path(folder).expanduser(), Path(output).expanduser()
    check_output(output, _ADAPTER, force=False)
    files = find_shards(folder)
    lora = LoRAConfig.from_pretrained(folder)
    degree = len(files)
    if lora.tensor_parallel_degree != degree:
        raise AdapterError(
            f"{folder} holds {degree} ranks; its {LORA_CONFIG_NAME} says "
            f"tensor_parallel_degree {lora.tensor_parallel_degree}",
            hint="are all files there, and none of another run?",
        )
    model = _model_config(folder if config is None else Path(config).expanduser())
    axis_of = parallel_axes(find_family(model), model, degree)
    state = merge_shards([read_state(file) for file in files], axis_of)
    merged = replace(lora, tensor_parallel_degree=_SINGLE_RANK)
    pairs, replacements = build_pairs(state, merged, str(folder))
    with AtomicFolder(output, _ADAPTER) as written:
        write_adapter(written.path, merged, state, _provenance(folder))
        single = {**model, "tensor_parallel_degree": _SINGLE_RANK}
        written.write_text(CONFIG, json.dumps(single, indent=2, ensure_ascii=False) + "\n")
        written.commit()
    spread = sum(axis_of(name) is not None for name in state)
    return MergedShards(output, degree, len(pairs), len(replacements), spread)


def find_shards(folder: Path) -> list[Path]:
    """The weight files of all ranks, in their order.

    Raises:
        AdapterError: not a folder of a LoRA adapter's ranks, some ranks missing, or pipeline stages.
    """
    if not folder.is_dir():
        raise AdapterError(f"{folder} is not a folder")
    if (folder / _PREFIX_CONFIG).is_file():
        raise AdapterError(
            f"{folder} holds a prefix: what the columns of its ranks mean is not what they mean on a "
            "single card, so putting them together gives another prefix",
            hint="train it again with tensor_parallel_degree 1",
        )
    names = [entry.name for entry in folder.iterdir()]
    found = {name: match for name in names if (match := _RANK_FILE.fullmatch(name))}
    stages = [name for name in names if re.search(r"[._]pp\d+\.pdparams$", name)]
    if stages:
        raise AdapterError(
            f"{folder} holds the files of pipeline stages, whose layers have other names:\n"
            f"{listed(stages)}",
            hint="save the adapter from a run without pipeline parallelism",
        )
    if not found:
        raise AdapterError(
            f"{folder} holds no files of tensor-parallel ranks, such as "
            f"lora_model_state.tp00.pdparams. It holds:\n{listed(names)}"
        )
    ranks = {int(match[1]): name for name, match in found.items()}
    missing = [f"rank {i}" for i in range(max(ranks) + 1) if i not in ranks]
    if missing or len(ranks) != len(found):
        raise AdapterError(
            f"{folder} does not hold one file a rank:\n{listed(missing or found)}",
        )
    return [folder / ranks[i] for i in sorted(ranks)]


def _model_config(path: Path) -> Mapping[str, Any]:
    file = path / CONFIG if path.is_dir() else path
    if not file.is_file():
        raise AdapterError(
            f"{file} is missing; it says which layers were spread over the ranks",
            hint="name the base model's config.json with --config",
        )
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{file} cannot be read: {exc}") from exc
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object, not a {type(content).__name__}")
    return content


def _provenance(folder: Path) -> Provenance | None:
    """Without the samples of weights: those of a rank are taken from its part of each."""
    found = Provenance.load(folder)
    return None if found is None else replace(found, base_weights={})
