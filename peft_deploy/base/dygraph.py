"""The base model as a PaddleNLP layer in the dynamic graph. Needs Paddle."""

from __future__ import annotations

from peft_deploy.environment import require_paddle

require_paddle("building the Paddle model")

from collections.abc import Mapping
from typing import Any

import numpy as np
import paddle
import paddlenlp.transformers
from paddle import nn
from paddlenlp.transformers.model_utils import no_init_weights

from peft_deploy.base.folder import BaseModel
from peft_deploy.base.mapped import LEAST, fill_mapped
from peft_deploy.errors import ConfigError
from peft_deploy.families import Family
from peft_deploy.families.standins.parameters import unique_parameters
from peft_deploy.progress import Progress, Silent
from peft_deploy.weights import DTYPES, Array

PADDLE_DTYPES = ("float32", "float16", "bfloat16", "float64")


def build_skeleton(family: Family, config: Mapping[str, Any]) -> nn.Layer:
    """The model's layers with named, shaped parameters that hold no memory; for tracing.

    Args:
        family: the model's family.
        config: its config.json, of either kind.

    Raises:
        UnsupportedModelError: the family refuses the configuration.
    """
    with paddle.LazyGuard(), no_init_weights(_enable=True):  # PaddleNLP would fill lazy weights in
        model = _construct(family, config)
    model.eval()
    return model


def load_model(
    base: BaseModel,
    dtype: str = "float32",
    progress: Progress | None = None,
    *,
    mapped: bool = False,
) -> nn.Layer:
    """The model with its weights, in evaluation mode.

    Args:
        base: the model.
        dtype: of the parameters; weights stored in another one are cast.
        progress: gets a phase with one unit a tensor.
        mapped: keep large parameters in files, see :mod:`~peft_deploy.base.mapped`; in float32 or float64.

    Raises:
        CheckpointError: tensors missing, unexpected, or of another shape than the model's.
    """
    if dtype not in PADDLE_DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(PADDLE_DTYPES)}")
    default = paddle.get_default_dtype()
    paddle.set_default_dtype(dtype)
    try:
        with paddle.LazyGuard(), no_init_weights(_enable=True):
            model = _construct(base.family, base.config)
    finally:
        paddle.set_default_dtype(default)
    parameters = unique_parameters(model)
    base.check({name: tuple(p.shape) for name, p in parameters.items()})
    stored = set(base.tensors.names())
    progress = progress or Silent()
    progress.phase("Loading the base model", len(parameters), "tensors")
    for name, parameter in parameters.items():
        # What no output depends on may be missing.
        data = base.tensors.read(name) if name in stored else np.zeros(parameter.shape, np.float32)
        large = mapped and data.size * DTYPES[dtype].itemsize >= LEAST
        if not (large and fill_mapped(parameter, data, dtype)):
            _fill(parameter, np.ascontiguousarray(data).astype(DTYPES[dtype], copy=False), dtype)
        progress.advance(1, name)
    model.eval()
    return model


def _construct(family: Family, config: Mapping[str, Any]) -> nn.Layer:
    config_class = getattr(paddlenlp.transformers, family.paddle_config)
    name = family.paddle_model(config)
    model_class = getattr(paddlenlp.transformers, name)
    given = {"use_cache": True, **family.paddle_arguments(config)}
    arguments = config_class(**given)
    for (
        key,
        value,
    ) in given.items():  # LlamaConfig's base class sets fuse_attention_qkv back to False
        if getattr(arguments, key, None) != value:
            setattr(arguments, key, value)
    arguments.architectures = [name]
    model = model_class(arguments)
    _tie(model, family.tied(config))
    family.settle(model)
    return model


def _tie(model: nn.Layer, tied: Mapping[str, str]) -> None:
    """Lets parameters share their storage where the configuration says so and PaddleNLP's class does not."""
    owners = dict(model.named_sublayers(include_self=True, remove_duplicate=False))
    for name, target in tied.items():
        module, _, own = name.rpartition(".")
        if module not in owners:  # a class may do without a layer that Hugging Face's model has
            continue
        other, _, attribute = target.rpartition(".")
        setattr(owners[module], own, getattr(owners[other], attribute))


def _fill(parameter: paddle.Tensor, data: Array, dtype: str) -> None:
    parameter.get_tensor().set(data, paddle.CPUPlace())
