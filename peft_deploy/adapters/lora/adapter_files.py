"""Writes the active adapter of a LoRAModel to a folder."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from peft_deploy.adapters.formats import write_adapter
from peft_deploy.adapters.lora.arrays import to_array
from peft_deploy.adapters.lora.attachment import Attachment
from peft_deploy.adapters.lora.loading import base_matrix
from peft_deploy.adapters.provenance import Provenance, WeightSample, sample_modules
from peft_deploy.config.json_file import make_folder
from peft_deploy.errors import AdapterError, OutputError

if TYPE_CHECKING:
    from peft_deploy.adapters.lora.model import LoRAModel


def save_adapter(
    model: LoRAModel,
    folder: Path,
    *,
    merge_tensor_parallel: bool,
    variant: str | None,
    is_main_process: bool,
    save_model_config: bool,
) -> None:
    """Writes the files of :meth:`LoRAModel.save_pretrained`.

    Raises:
        OutputError: the folder cannot be written.
        AdapterError: merging the ranks of a tensor-parallel model was asked for.
    """
    config = model.lora_config
    if config.tensor_parallel_degree > 1:
        if merge_tensor_parallel:
            raise AdapterError(
                "merge_tensor_parallel with "
                f"tensor_parallel_degree {config.tensor_parallel_degree} is not supported",
                hint="save every rank with merge_tensor_parallel=False",
            )
        variant = variant or _rank_suffix()
    if not is_main_process and config.tensor_parallel_degree <= 1 and variant is None:
        return  # every data-parallel rank holds the same adapter
    tensors = {name: to_array(t) for name, t in model.get_trainable_state_dict().items()}
    # merge_weights is a deprecated wish about the process, but belongs to the file's options.
    write_adapter(folder, replace(config), tensors, provenance_of(model), variant)
    model_config = getattr(model.model, "config", None)
    if is_main_process and save_model_config and hasattr(model_config, "save_pretrained"):
        _save_model_config(copy.deepcopy(model_config), folder, merge_tensor_parallel)


def provenance_of(model: LoRAModel) -> Provenance:
    """Where the active adapter comes from."""
    attachment: Attachment = model._attachment
    samples = {}
    for name in sample_modules(list(attachment.adapted)):
        weight = base_matrix(attachment, name)
        if weight is not None:
            samples[name] = WeightSample.of(weight)
    return Provenance(
        base_fingerprint=model.base_fingerprint,
        base_weights=samples,
        merged=attachment.merged,
        principal_start=attachment.config.pissa,
    )


def _save_model_config(config: object, folder: Path, merge_tensor_parallel: bool) -> None:
    """Through a folder beside the target, since PaddleNLP writes in place."""
    if merge_tensor_parallel:
        config.tensor_parallel_degree = -1  # type: ignore[attr-defined]
    make_folder(folder)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".config.") as temporary:
            config.save_pretrained(temporary)  # type: ignore[attr-defined]
            for file in Path(temporary).iterdir():
                file.replace(folder / file.name)
    except OSError as exc:
        raise OutputError(f"config.json cannot be written to {folder}: {exc}") from exc


def _rank_suffix() -> str:
    from paddlenlp.transformers.utils import weight_name_suffix

    return str(weight_name_suffix())
