"""A LoRAModel from an adapter's folder, and its active adapter into one."""

from __future__ import annotations

import copy
import os
import tempfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import paddle
from paddle import nn

from peft_deploy.adapters.arrays import to_array
from peft_deploy.adapters.formats import write_adapter
from peft_deploy.adapters.formats.ranks import SINGLE_RANK
from peft_deploy.adapters.lora.attachment import Attachment
from peft_deploy.adapters.lora.loading import base_matrix, load_into
from peft_deploy.adapters.lora.ranks import (
    degree_of,
    gather,
    rank_of,
    rank_variant,
    read_for,
    without_rank,
)
from peft_deploy.adapters.provenance import (
    Provenance,
    WeightSample,
    sample_modules,
)
from peft_deploy.config import LoRAConfig
from peft_deploy.config.json_file import make_folder
from peft_deploy.errors import OutputError

if TYPE_CHECKING:
    from typing_extensions import Self


class AdapterFolders:
    """The part of LoRAModel that reads and writes adapter folders."""

    model: nn.Layer
    base_fingerprint: str | None

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Layer,
        lora_path: str | os.PathLike[str],
        lora_config: LoRAConfig | None = None,
        **kwargs: Any,
    ) -> Self:
        """A model with a saved adapter; strict about every key.

        Args:
            model: the base model that the adapter was trained on.
            lora_path: the folder that :meth:`save_pretrained` or the reference wrote, on one card
                or on any number of tensor-parallel ranks.
            lora_config: in place of the folder's ``lora_config.json``.
            kwargs: ``variant`` as given to :meth:`save_pretrained`.

        Raises:
            AdapterError: files missing or damaged, or keys missing, unexpected or mis-shaped. The
                model is as it was before.
        """
        adapter = read_for(model, Path(lora_path), lora_config, kwargs.get("variant"))
        instance = cls.__new__(cls)
        nn.Layer.__init__(instance)
        instance._start(model, adapter.config, quiet=True)
        try:
            load_into(instance._attachment, adapter)
        except BaseException:
            instance.restore_original_model()
            raise
        if adapter.provenance is not None:
            instance.base_fingerprint = adapter.provenance.base_fingerprint
        return instance

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        merge_tensor_parallel: bool = True,
        *,
        variant: str | None = None,
        is_main_process: bool | None = None,
        save_model_config: bool = True,
        **kwargs: Any,
    ) -> None:
        """Writes the active adapter in the reference's format.

        The folder then has ``lora_model_state.pdparams``, ``lora_config.json``, the model's
        ``config.json``, and ``peft_deploy_adapter.json`` with where the adapter comes from.

        Args:
            save_directory: made when it is missing.
            merge_tensor_parallel: True, as the specification says; paddlenlp.peft has False. For a
                model that is spread over tensor-parallel ranks, whether
                rank 0 writes the whole adapter, gathered from all ranks, which have to call this
                together; otherwise each writes its part to ``lora_model_state.tp00.pdparams``, ….
            variant: stands before the extension of the weight file.
            is_main_process: whether this process writes the configurations; rank 0 when None.
            save_model_config: whether ``config.json`` is written.
            kwargs: ignored; PaddleNLP's Trainer passes more.

        Raises:
            OutputError: the folder cannot be written.
            AdapterError: the ranks cannot be gathered, or hold what does not belong together.
        """
        main = paddle.distributed.get_rank() == 0 if is_main_process is None else is_main_process
        save_adapter(
            self,
            Path(save_directory),
            merge_tensor_parallel=merge_tensor_parallel,
            variant=variant,
            is_main_process=main,
            save_model_config=save_model_config,
        )

    @property
    def _attachment(self) -> Attachment:
        raise NotImplementedError

    def _start(self, model: nn.Layer, config: LoRAConfig, *, quiet: bool = False) -> None:
        raise NotImplementedError

    def restore_original_model(self) -> nn.Layer:
        """The very model that was passed in."""
        raise NotImplementedError

    def get_trainable_state_dict(self) -> OrderedDict[str, paddle.Tensor]:
        """What belongs to the active adapter."""
        raise NotImplementedError


def save_adapter(
    model: AdapterFolders,
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
        AdapterError: the ranks cannot be gathered, or hold what does not belong together.
    """
    attachment: Attachment = model._attachment
    config, spread = attachment.config, degree_of(model.model) > 1
    if not spread and not is_main_process and variant is None:
        return  # every data-parallel rank holds the same adapter
    tensors = {name: to_array(t) for name, t in model.get_trainable_state_dict().items()}
    if spread and merge_tensor_parallel:
        tensors = gather(attachment, tensors)
        if not is_main_process or rank_of(model.model) > 0:
            return
        variant, config = (
            without_rank(variant),
            replace(config, tensor_parallel_degree=SINGLE_RANK),
        )
    elif spread:
        variant = variant or rank_variant(model.model)
    write_adapter(folder, config, tensors, provenance_of(model), variant)
    model_config = getattr(model.model, "config", None)
    if is_main_process and save_model_config and hasattr(model_config, "save_pretrained"):
        _save_model_config(
            copy.deepcopy(model_config), folder, single=spread and merge_tensor_parallel
        )


def provenance_of(model: AdapterFolders) -> Provenance:
    """Where the active adapter comes from."""
    attachment: Attachment = model._attachment
    samples = {}
    # a rank's weights are parts of the base's, whose samples would be those of another model
    names = [] if degree_of(model.model) > 1 else list(attachment.adapted)
    for name in sample_modules(names):
        weight = base_matrix(attachment, name)
        if weight is not None:
            samples[name] = WeightSample.of(weight)
    return Provenance(
        base_fingerprint=model.base_fingerprint,
        base_weights=samples,
        merged=attachment.merged,
        principal_start=attachment.config.pissa,
    )


def _save_model_config(config: object, folder: Path, *, single: bool) -> None:
    """Through a folder beside the target, since PaddleNLP writes in place."""
    if single:
        config.tensor_parallel_degree = SINGLE_RANK  # type: ignore[attr-defined]
    make_folder(folder)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".config.") as temporary:
            config.save_pretrained(temporary)  # type: ignore[attr-defined]
            for file in Path(temporary).iterdir():
                file.replace(folder / file.name)
    except OSError as exc:
        raise OutputError(f"config.json cannot be written to {folder}: {exc}") from exc
