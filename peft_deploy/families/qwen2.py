"""Qwen2 and Qwen2.5 (Yang et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_deploy.families.registry import register
from peft_deploy.families.rotary_decoder import RotaryDecoder, rotary_parallel_rules


@register
class Qwen2(RotaryDecoder):
    """Llama with biases on queries, keys and values."""

    model_type = "qwen2"
    genai_type = "qwen2"
    architectures = {"Qwen2ForCausalLM": "Qwen2ForCausalLM"}
    paddle_config = "Qwen2Config"
    # The window is asked for by use_sliding_window alone.
    inert = RotaryDecoder.inert | {"sliding_window", "max_window_layers", "layer_types"}
    body = "qwen2"
    reference = "PaddleNLP's Qwen2"
    defaults = {"max_position_embeddings": 32768, "num_key_value_heads": 32}
    qkv_bias = True
    may_fuse = True
    parallel_rules = rotary_parallel_rules("qwen2")
    refused = {
        "dual_chunk_attention_config": "dual chunk attention, which PaddleNLP's Qwen2 does not have",
    }

    def remarks(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """See :meth:`Family.remarks`."""
        if not config.get("use_sliding_window"):
            return ()
        return (
            f"config.json sets use_sliding_window; PaddleNLP's Qwen2 attends to the whole text all the same, and so "
            f"does what is exported: texts longer than {config.get('sliding_window')} tokens give other "
            "logits than in transformers",
        )

    def huggingface_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Says what is computed: attention to the whole text."""
        return {**super().huggingface_config(config), "use_sliding_window": False}
