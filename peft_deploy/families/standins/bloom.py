"""PaddleNLP's ``BloomForCausalLM``, computed by the stand-ins."""

from __future__ import annotations

import paddle
from paddle import Tensor, nn
from paddle.nn import functional as F

from peft_deploy.families.standins.attention import (
    alibi_bias,
    alibi_slopes,
    cached_attention,
    causal_bias,
    split_fused_heads,
)
from peft_deploy.families.standins.layers import gelu_tanh, layer_norm, linear
from peft_deploy.families.standins.stand_in import AlibiDecoderStandIn


class BloomStandIn(AlibiDecoderStandIn):
    """Shares the parameters of the model it stands for.

    Args:
        model: PaddleNLP's ``BloomForCausalLM``.
    """

    def __init__(self, model: nn.Layer) -> None:
        super().__init__(model)
        self.heads = model.config.n_head
        self.head_dim = model.config.hidden_size // self.heads
        self.sum_after_norm = model.config.apply_residual_connection_post_layernorm
        self.slopes = alibi_slopes(self.heads)

    def _run(self, input_ids: Tensor, attention_mask: Tensor, past: list[Tensor]) -> list[Tensor]:
        decoder, scope = self.model.bloom, self.scopes
        presents: list[Tensor] = []
        with scope("bloom"):
            with scope("word_embeddings"):
                x = F.embedding(input_ids, decoder.word_embeddings.weight)  # [B, S, E]
            x = self._norm(decoder, "word_embeddings_layernorm", x)
            # [B, 1, S, T] + [B, H, 1, T]
            bias = causal_bias(input_ids, attention_mask)
            bias = bias + alibi_bias(attention_mask, self.slopes)
            for i, layer in enumerate(decoder.h):
                with scope("h", str(i)):
                    x, present = self._layer(layer, x, bias, past[2 * i : 2 * i + 2])
                    presents += present
            x = self._norm(decoder, "ln_f", x)
        with scope("lm_head"):
            logits = paddle.matmul(x, self.model.lm_head.decoder_weight, transpose_y=True)
        return [logits, *presents]

    def _layer(
        self, layer: nn.Layer, x: Tensor, bias: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        h = self._norm(layer, "input_layernorm", x)
        out, present = self._attention(layer.self_attention, h, bias, past)
        x = out + (h if self.sum_after_norm else x)
        h = self._norm(layer, "post_attention_layernorm", x)
        return self._feed_forward(layer.mlp, h) + (h if self.sum_after_norm else x), present

    def _norm(self, layer: nn.Layer, name: str, x: Tensor) -> Tensor:
        with self.scopes(name):
            return layer_norm(getattr(layer, name), x)

    def _attention(
        self, attention: nn.Layer, h: Tensor, bias: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        with self.scopes("self_attention"):
            with self.scopes("query_key_value"):
                fused = linear(attention.query_key_value, h)
            q, k, v = split_fused_heads(fused, self.heads, self.head_dim)
            out, present = cached_attention(q, k, v, past, bias, scale=self.head_dim**-0.5)
            with self.scopes("dense"):
                return linear(attention.dense, out), present

    def _feed_forward(self, mlp: nn.Layer, h: Tensor) -> Tensor:
        with self.scopes("mlp"):
            with self.scopes("dense_h_to_4h"):
                h = linear(mlp.dense_h_to_4h, h)
            h = gelu_tanh(h)
            with self.scopes("dense_4h_to_h"):
                return linear(mlp.dense_4h_to_h, h)
