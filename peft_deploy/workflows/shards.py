"""From the files of tensor-parallel ranks to an ordinary adapter folder."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from peft_deploy.adapters.formats.paddlenlp import write_adapter
from peft_deploy.adapters.formats.pairs import build_pairs
from peft_deploy.adapters.formats.ranks import (
    SINGLE_RANK,
    find_rank_files,
    rank_axes,
    read_model_config,
    read_ranks,
)
from peft_deploy.adapters.provenance import Provenance, without_samples
from peft_deploy.atomic_folder import AtomicFolder, FolderKind, check_output
from peft_deploy.base.folder import CONFIG
from peft_deploy.config import LORA_CONFIG_NAME, LoRAConfig

_ADAPTER = FolderKind("adapter", LORA_CONFIG_NAME)


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
    degree = len(find_rank_files(folder))
    lora = LoRAConfig.from_pretrained(folder)
    model = read_model_config(folder if config is None else Path(config).expanduser())
    state = read_ranks(folder, lora, model)
    merged = replace(lora, tensor_parallel_degree=SINGLE_RANK)
    pairs, replacements = build_pairs(state, merged, str(folder))
    with AtomicFolder(output, _ADAPTER) as written:
        write_adapter(written.path, merged, state, without_samples(Provenance.load(folder)))
        single = {**model, "tensor_parallel_degree": SINGLE_RANK}
        written.write_text(CONFIG, json.dumps(single, indent=2, ensure_ascii=False) + "\n")
        written.commit()
    axis_of = rank_axes(model, degree)
    spread = sum(axis_of(name) is not None for name in state)
    return MergedShards(output, degree, len(pairs), len(replacements), spread)
