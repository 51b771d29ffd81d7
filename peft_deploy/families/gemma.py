"""Gemma (Gemma Team 2024), the first generation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peft_deploy.families.entries import Entries
from peft_deploy.families.registry import register
from peft_deploy.families.rotary_decoder import RotaryDecoder, rotary_parallel_rules

if TYPE_CHECKING:
    from paddle import Tensor, nn

    from peft_deploy.signature import GraphSignature


@register
class Gemma(RotaryDecoder):
    """Scaled embeddings, norms that multiply by 1 + weight, GELU, heads of any size."""

    model_type = "gemma"
    genai_type = "gemma"
    architectures = {"GemmaForCausalLM": "GemmaForCausalLM"}
    paddle_config = "GemmaConfig"
    body = "gemma"
    reference = "PaddleNLP's Gemma"
    defaults = {
        "max_position_embeddings": 8192,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "tie_word_embeddings": True,
    }
    own_head_dim = True
    inert = RotaryDecoder.inert | {
        "hidden_act"
    }  # where hidden_activation is there, which goes before it
    activation = "gelu"
    activations = ("gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast")
    parallel_rules = rotary_parallel_rules("gemma")
    refused = {
        "attention_bias": "biases in the attention projections, which PaddleNLP's Gemma does not have,",
        "alibi": "ALiBi in place of rotary positions",
        "use_bidirectional_attention": "attention to later tokens",
    }

    def remarks(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """See :meth:`Family.remarks`."""
        asked = config.get("hidden_activation")
        if asked == self.activation:
            return ()
        # Without hidden_activation transformers takes the tanh form, whatever hidden_act says.
        return (
            f"config.json gives {asked or 'nothing'} as hidden_activation; PaddleNLP's Gemma computes the erf form of "
            "GELU all the same, and so does what is exported, where transformers computes the tanh form: its logits "
            "differ slightly",
        )

    def huggingface_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Says what is computed; transformers goes by ``hidden_activation``."""
        return {**super().huggingface_config(config), "hidden_activation": self.activation}

    def stand_in(self, model: nn.Layer) -> nn.Layer:
        """See :meth:`Family.stand_in`."""
        from paddle.nn import functional as F

        from peft_deploy.families.standins.rotary_decoder import RotaryDecoderStandIn

        return RotaryDecoderStandIn(
            model,
            self.body,
            activation=F.gelu,
            norm_offset=1.0,
            embedding_scale=model.config.hidden_size**0.5,
        )

    def run_eagerly(
        self, model: nn.Layer, feeds: Mapping[str, Tensor], signature: GraphSignature
    ) -> dict[str, Tensor]:
        """See :meth:`Family.run_eagerly`."""
        from peft_deploy.families.eager import frequencies_in_float32

        with frequencies_in_float32(model):
            return super().run_eagerly(model, feeds, signature)

    def _refuse(self, entries: Mapping[str, Any]) -> None:
        super()._refuse(Entries({"hidden_act": entries.get("hidden_activation")}, entries))
