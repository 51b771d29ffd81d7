"""An adapter of a model that is spread over tensor-parallel ranks: gathered from them, and split
for one of them.

Which tensors are spread, and along which axis, is what fleet's layers say of their parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import paddle
from paddle import nn
from paddle.distributed import fleet

from peft_deploy.adapters.formats import Adapter, read_adapter
from peft_deploy.adapters.formats.ranks import has_rank_files
from peft_deploy.adapters.lora.attachment import Attachment
from peft_deploy.adapters.lora.column_order import reordered_columns
from peft_deploy.adapters.lora.trainable import named_parameters
from peft_deploy.config import LORA_CONFIG_NAME, LoRAConfig
from peft_deploy.errors import AdapterError
from peft_deploy.weights.source import Array
from peft_deploy.weights.tensor_parallel import AxisOf, merge_shards, split_shards


def degree_of(model: nn.Layer) -> int:
    """N, the number of tensor-parallel ranks that a model is spread over; 1 when it is not."""
    degree = getattr(getattr(model, "config", None), "tensor_parallel_degree", 1)
    return max(1, int(degree or 1))


def rank_of(model: nn.Layer) -> int:
    """This process's rank among them, from fleet, or from the model's config without fleet."""
    group = _model_parallel_group()
    if group is not None:
        return int(group.rank)
    return int(getattr(getattr(model, "config", None), "tensor_parallel_rank", 0) or 0)


def axes_of(attachment: Attachment) -> AxisOf:
    """For each tensor of an adapter, the axis along which it is spread; None for one that all
    ranks share.
    """
    parameters = named_parameters(attachment.model)
    for module, adapted in attachment.adapted.items():  # not in the model while it is detached
        parameters[f"{module}.lora_A"] = adapted.layer.lora_A
        parameters[f"{module}.lora_B"] = adapted.layer.lora_B
    reordered = reordered_columns(attachment.model, degree_of(attachment.model))

    def axis(name: str) -> int | None:
        parameter = parameters.get(name)
        if parameter is None or not getattr(parameter, "is_distributed", False):
            return None
        if name.rpartition(".")[0] in reordered:
            raise AdapterError(
                f"{name}: of this layer, which holds several matrices side by side, each rank has "
                "a slice of each; such slices are neither put together nor made",
                hint="switch the model's fused layers off, or leave the layer out of "
                "target_modules and trainable_modules",
            )
        return cast("int", parameter.split_axis)

    return axis


def read_for(
    model: nn.Layer, path: Path, config: LoRAConfig | None = None, variant: str | None = None
) -> Adapter:
    """An adapter as this rank needs it, whatever number of ranks saved it.

    Ranks that were as many as the model's are not put together: this rank reads its own file.

    Args:
        model: the base model.
        path: the adapter's folder.
        config: in place of the folder's ``lora_config.json``.
        variant: as given to ``save_pretrained``.

    Raises:
        AdapterError: the adapter cannot be read.
        UnsupportedModelError: files of another number of ranks, and it is not known how the model
            is spread.
    """
    if degree_of(model) > 1 and variant is None and path.is_dir() and has_rank_files(path):
        known = config is not None or (path / LORA_CONFIG_NAME).is_file()
        saved = (config or LoRAConfig.from_pretrained(path)) if known else None
        if saved is not None and saved.tensor_parallel_degree == degree_of(model):
            return read_adapter(path, saved, rank_variant(model))
    options: Any = getattr(model, "config", None)
    described = None
    if hasattr(options, "to_dict"):
        described = {**options.to_dict(), "architectures": [type(model).__name__]}
    return read_adapter(path, config, variant, described)


def for_this_rank(attachment: Attachment, adapter: Adapter) -> Adapter:
    """The adapter itself, or this rank's part of a whole one for a model that is spread."""
    if degree_of(attachment.model) == 1 or adapter.config.tensor_parallel_degree > 1:
        return adapter
    state = split(attachment, adapter.state)
    replaced = {name: state[name] for name in adapter.replacements}
    # its samples are of whole weights, of which this rank has a part
    return replace(adapter, state=state, replacements=replaced, provenance=None)


def gather(attachment: Attachment, state: Mapping[str, Array]) -> dict[str, Array]:
    """The tensors of the whole adapter; every rank has to call this.

    Args:
        attachment: the active adapter.
        state: what this rank holds of it.

    Raises:
        AdapterError: fleet was not started with as many ranks as the model is spread over, or the
            ranks hold what does not belong together.
    """
    degree, group = degree_of(attachment.model), _model_parallel_group()
    if group is None or group.nranks != degree:
        raise AdapterError(
            f"merge_tensor_parallel needs all {degree} tensor-parallel ranks, but "
            + ("fleet is not started" if group is None else f"fleet's group has {group.nranks}"),
            hint="save every rank with merge_tensor_parallel=False, "
            "then: peft-deploy adapter merge-shards DIR DST",
        )
    shards: list[dict[str, Array]] = []
    paddle.distributed.all_gather_object(shards, dict(state), group=group)
    return merge_shards(shards, axes_of(attachment))


def split(attachment: Attachment, state: Mapping[str, Array]) -> dict[str, Array]:
    """What this rank holds of a whole adapter's tensors.

    Raises:
        AdapterError: a size that does not divide by the number of ranks.
    """
    model = attachment.model
    return split_shards(state, degree_of(model), axes_of(attachment))[rank_of(model)]


def without_rank(variant: str | None) -> str | None:
    """A weight file's variant without the tensor-parallel rank in it: ``tp00_pp01`` → ``pp01``."""
    parts = [part for part in (variant or "").split("_") if "tp" not in part]
    return "_".join(parts) or None


def rank_variant(model: nn.Layer) -> str:
    """The variant of this rank's weight file, as the reference names it: ``tp00``."""
    return f"tp{rank_of(model):02}"


def _model_parallel_group() -> Any:
    """Fleet's group of tensor-parallel ranks; None when fleet is not started."""
    if getattr(fleet.fleet, "_hcg", None) is None:
        return None
    return fleet.get_hybrid_communicate_group().get_model_parallel_group()
