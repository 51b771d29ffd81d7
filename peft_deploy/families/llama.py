"""Llama (Touvron et al. 2023): Llama 1 to 3, SmolLM, TinyLlama, Yi and others of that type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_deploy.families.registry import register
from peft_deploy.families.rope import scaled_arguments
from peft_deploy.families.rotary_decoder import RotaryDecoder, rotary_parallel_rules


@register
class Llama(RotaryDecoder):
    """The family that the others are described by: RMS norm, SiLU, no biases."""

    model_type = "llama"
    genai_type = "llama"
    architectures = {"LlamaForCausalLM": "LlamaForCausalLM"}
    paddle_config = "LlamaConfig"
    body = "llama"
    reference = "PaddleNLP's Llama"
    defaults = {"max_position_embeddings": 2048}
    may_fuse = True
    parallel_rules = rotary_parallel_rules("llama")
    refused = {
        "attention_bias": "biases in the attention projections, which PaddleNLP's Llama does not have",
        "mlp_bias": "biases in the feed-forward block, which PaddleNLP's Llama does not have",
        "alibi": "ALiBi in place of rotary positions",
        "use_long_sequence_strategies": "PaddleNLP's long-sequence strategies",
    }

    def rope_arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Linear, NTK and Llama 3's scaling are computed by PaddleNLP's Llama alone."""
        return scaled_arguments(config)
