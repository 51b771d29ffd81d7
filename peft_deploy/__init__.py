"""From a PaddlePaddle model fine-tuned with LoRA to a verified ONNX bundle.

Everything here is imported when it is first used: ``import peft_deploy`` needs neither Paddle nor onnxruntime.

Example:
    >>> import peft_deploy
    >>> peft_deploy.export("base/", "bundle/", adapter="adapter/")  # doctest: +SKIP
    >>> peft_deploy.load_bundle("bundle/").generate("Hello")  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_deploy.lazy import lazy_names

if TYPE_CHECKING:
    from peft_deploy.adapters.lora import (
        ColumnParallelLoRALinear,
        ColumnParallelLoRAMergedLinear,
        LoRAConv2D,
        LoRAEmbedding,
        LoRALinear,
        LoRAMergedLinear,
        LoRAModel,
        RowParallelLoRALinear,
        mark_only_lora_as_trainable,
    )
    from peft_deploy.adapters.prefix import (
        PrefixModel,
        PrefixModelForCausalLM,
        bloom_postprocess_past_key_value,
        chatglm_postprocess_past_key_value,
        llama_postprocess_past_key_value,
        mistral_postprocess_past_key_value,
        qwen_postprocess_past_key_value,
    )
    from peft_deploy.config import LoRAConfig, PrefixConfig
    from peft_deploy.config.export import ExportOptions
    from peft_deploy.config.merge import MergeOptions
    from peft_deploy.runtime import load_bundle
    from peft_deploy.training import TrainOptions, train
    from peft_deploy.workflows.export import export
    from peft_deploy.workflows.merge import merge
    from peft_deploy.workflows.validate import validate

__version__ = "0.1.0"

__all__ = [
    "ColumnParallelLoRALinear",
    "ColumnParallelLoRAMergedLinear",
    "ExportOptions",
    "LoRAConfig",
    "LoRAConv2D",
    "LoRAEmbedding",
    "LoRALinear",
    "LoRAMergedLinear",
    "LoRAModel",
    "MergeOptions",
    "PrefixConfig",
    "PrefixModel",
    "PrefixModelForCausalLM",
    "RowParallelLoRALinear",
    "TrainOptions",
    "bloom_postprocess_past_key_value",
    "chatglm_postprocess_past_key_value",
    "export",
    "llama_postprocess_past_key_value",
    "load_bundle",
    "mark_only_lora_as_trainable",
    "merge",
    "mistral_postprocess_past_key_value",
    "qwen_postprocess_past_key_value",
    "train",
    "validate",
]

_HOME = {
    "ColumnParallelLoRALinear": "peft_deploy.adapters.lora",
    "ColumnParallelLoRAMergedLinear": "peft_deploy.adapters.lora",
    "ExportOptions": "peft_deploy.config.export",
    "LoRAConfig": "peft_deploy.config",
    "LoRAConv2D": "peft_deploy.adapters.lora",
    "LoRAEmbedding": "peft_deploy.adapters.lora",
    "LoRALinear": "peft_deploy.adapters.lora",
    "LoRAMergedLinear": "peft_deploy.adapters.lora",
    "LoRAModel": "peft_deploy.adapters.lora",
    "MergeOptions": "peft_deploy.config.merge",
    "PrefixConfig": "peft_deploy.config",
    "PrefixModel": "peft_deploy.adapters.prefix",
    "PrefixModelForCausalLM": "peft_deploy.adapters.prefix",
    "RowParallelLoRALinear": "peft_deploy.adapters.lora",
    "TrainOptions": "peft_deploy.training",
    "bloom_postprocess_past_key_value": "peft_deploy.adapters.prefix",
    "chatglm_postprocess_past_key_value": "peft_deploy.adapters.prefix",
    "export": "peft_deploy.workflows.export",
    "llama_postprocess_past_key_value": "peft_deploy.adapters.prefix",
    "load_bundle": "peft_deploy.runtime",
    "mark_only_lora_as_trainable": "peft_deploy.adapters.lora",
    "merge": "peft_deploy.workflows.merge",
    "mistral_postprocess_past_key_value": "peft_deploy.adapters.prefix",
    "qwen_postprocess_past_key_value": "peft_deploy.adapters.prefix",
    "train": "peft_deploy.training",
    "validate": "peft_deploy.workflows.validate",
}


__getattr__ = lazy_names(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
