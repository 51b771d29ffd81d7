"""Prefix-tuning in the dynamic graph: a model whose every layer sees trained keys and values
before its tokens.

Owns the encoder that makes them, PrefixModelForCausalLM around a model, and how a past is arranged
for each of PaddleNLP's models; needs Paddle. Must not import training, tracing or anything below;
reading and writing of files is in ``adapters.formats``.
"""

from peft_deploy.environment import require_paddle

require_paddle("prefix-tuning in the dynamic graph")

from peft_deploy.adapters.prefix.errors import (
    PrefixInputError,
    UnsupportedPrefixModelError,
)
from peft_deploy.adapters.prefix.model import PrefixModel, PrefixModelForCausalLM
from peft_deploy.adapters.prefix.postprocess import (
    bloom_postprocess_past_key_value,
    chatglm_postprocess_past_key_value,
    llama_postprocess_past_key_value,
    mistral_postprocess_past_key_value,
    qwen_postprocess_past_key_value,
)
from peft_deploy.config import PrefixConfig

__all__ = [
    "PrefixConfig",
    "PrefixInputError",
    "PrefixModel",
    "PrefixModelForCausalLM",
    "UnsupportedPrefixModelError",
    "bloom_postprocess_past_key_value",
    "chatglm_postprocess_past_key_value",
    "llama_postprocess_past_key_value",
    "mistral_postprocess_past_key_value",
    "qwen_postprocess_past_key_value",
]
