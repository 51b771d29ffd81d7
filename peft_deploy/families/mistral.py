"""Mistral (Jiang et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_deploy.errors import UnsupportedModelError
from peft_deploy.families.registry import register
from peft_deploy.families.rotary_decoder import RotaryDecoder, rotary_parallel_rules


@register
class Mistral(RotaryDecoder):
    """Llama as PaddleNLP computes it: without the window, and with a padding token whose embedding is zero."""

    model_type = "mistral"
    genai_type = "mistral"
    architectures = {"MistralForCausalLM": "MistralForCausalLM"}
    paddle_config = "MistralConfig"
    past_layout = "BKSD"
    body = "mistral"
    reference = "PaddleNLP's Mistral"
    defaults = {"max_position_embeddings": 131072, "num_key_value_heads": 8}
    parallel_rules = rotary_parallel_rules("mistral")
    refused = {
        "tie_word_embeddings": "a head that shares the embeddings, which PaddleNLP's Mistral does not have,",
    }

    def remarks(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """See :meth:`Family.remarks`."""
        window, limit = config.get("sliding_window"), self.dims(config).max_positions
        if not window or window >= limit:
            return ()
        return (
            f"config.json sets sliding_window to {window}; PaddleNLP's Mistral attends to the whole text all the "
            f"same, and so does what is exported: texts longer than {window} tokens give other logits than in "
            "transformers",
        )

    def huggingface_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Says what is computed: attention to the whole text."""
        return {**super().huggingface_config(config), "sliding_window": None}

    def _refuse(self, entries: Mapping[str, Any]) -> None:
        super()._refuse(entries)
        token, vocab = entries.get("pad_token_id", 0), entries["vocab_size"]
        if not -vocab <= token < vocab:
            raise UnsupportedModelError(
                f"config.json sets pad_token_id to {token}; PaddleNLP's Mistral needs one of its {vocab} tokens"
            )
