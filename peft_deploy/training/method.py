"""What differs between the methods: how an adapter is made for a base model, and read again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import paddle

from peft_deploy.adapters import read_adapter
from peft_deploy.adapters.formats.prefix import read_prefix
from peft_deploy.adapters.lora import LoRAModel
from peft_deploy.adapters.prefix import PrefixModelForCausalLM
from peft_deploy.base import BaseModel
from peft_deploy.base.dygraph import load_model
from peft_deploy.config import LoRAConfig, PrefixConfig
from peft_deploy.errors import ConfigError
from peft_deploy.progress import Progress
from peft_deploy.training.options import LEAST_LENGTH, TrainOptions

AdapterModel = LoRAModel | PrefixModelForCausalLM


def adapter_config(options: TrainOptions, base: BaseModel) -> LoRAConfig | PrefixConfig:
    """The adapter's options; LoRA's with the family's layers where no targets are given."""
    if options.prefix is not None:
        return options.prefix
    lora = options.lora or LoRAConfig()
    return replace(lora, target_modules=lora.target_modules or list(base.family.lora_targets))


def longest_example(options: TrainOptions, base: BaseModel) -> int:
    """The tokens that an example may have: ``max_length``, and no more than the model has
    positions beside the prefix.

    Raises:
        ConfigError: the prefix leaves no positions to learn from.
    """
    prefix = 0 if options.prefix is None else options.prefix.num_prefix_tokens or 0
    free = base.dims.max_positions - prefix
    if free < LEAST_LENGTH:
        raise ConfigError(
            f"num_prefix_tokens is {prefix}, and the model has {base.dims.max_positions} "
            f"positions; examples need at least {LEAST_LENGTH} of them",
            hint="use a prefix of fewer tokens",
        )
    return min(options.max_length, free)


def build_model(
    base: BaseModel, config: LoRAConfig | PrefixConfig, options: TrainOptions, progress: Progress
) -> AdapterModel:
    """The base model with a fresh adapter, whose first values the seed decides."""
    model = load_model(base, options.dtype, progress)
    if options.recompute:
        model.recompute_enable()
    paddle.seed(options.seed)
    made: AdapterModel = (
        PrefixModelForCausalLM(model, config)
        if isinstance(config, PrefixConfig)
        else LoRAModel(model, config)
    )
    made.base_fingerprint = base.fingerprint
    return made


def load_weights(model: AdapterModel, folder: Path) -> None:
    """Gives a checkpoint's adapter to the model.

    Raises:
        AdapterError: it is missing, damaged, or does not fit.
    """
    # By type(): isinstance() says of a prefix model that it is PaddleNLP's.
    prefixed = type(model) is PrefixModelForCausalLM
    model.set_state_dict((read_prefix if prefixed else read_adapter)(folder).state)
