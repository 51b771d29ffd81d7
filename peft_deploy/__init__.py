"""From a PaddlePaddle model fine-tuned with LoRA to a verified ONNX bundle.

Everything here is imported when it is first used: ``import peft_deploy`` needs neither Paddle nor onnxruntime.

Example:
    >>> import peft_deploy
    >>> peft_deploy.export("base/", "bundle/", adapter="adapter/")  # doctest: +SKIP
    >>> peft_deploy.load_bundle("bundle/").generate("Hello")  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_deploy.adapters.lora import LoRAModel, mark_only_lora_as_trainable
    from peft_deploy.adapters.prefix import PrefixModel, PrefixModelForCausalLM
    from peft_deploy.config import LoRAConfig, PrefixConfig
    from peft_deploy.config.export import ExportOptions
    from peft_deploy.config.merge import MergeOptions
    from peft_deploy.runtime import load_bundle
    from peft_deploy.workflows.export import export
    from peft_deploy.workflows.merge import merge
    from peft_deploy.workflows.validate import validate

__version__ = "0.1.0"

__all__ = [
    "ExportOptions",
    "LoRAConfig",
    "LoRAModel",
    "MergeOptions",
    "PrefixConfig",
    "PrefixModel",
    "PrefixModelForCausalLM",
    "export",
    "load_bundle",
    "mark_only_lora_as_trainable",
    "merge",
    "validate",
]

_HOME = {
    "ExportOptions": "peft_deploy.config.export",
    "LoRAConfig": "peft_deploy.config",
    "LoRAModel": "peft_deploy.adapters.lora",
    "MergeOptions": "peft_deploy.config.merge",
    "PrefixConfig": "peft_deploy.config",
    "PrefixModel": "peft_deploy.adapters.prefix",
    "PrefixModelForCausalLM": "peft_deploy.adapters.prefix",
    "export": "peft_deploy.workflows.export",
    "load_bundle": "peft_deploy.runtime",
    "mark_only_lora_as_trainable": "peft_deploy.adapters.lora",
    "merge": "peft_deploy.workflows.merge",
    "validate": "peft_deploy.workflows.validate",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
