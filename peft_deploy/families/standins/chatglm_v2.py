"""PaddleNLP's ``ChatGLMv2ForCausalLM``, computed by the stand-ins."""

from __future__ import annotations

import paddle
from paddle import Tensor, nn
from paddle.nn import functional as F

from peft_deploy.families.standins.attention import cached_attention, causal_bias, split_heads
from peft_deploy.families.standins.layers import linear, rms_norm, silu_gated
from peft_deploy.families.standins.rotary import NeighbourRotaryTable
from peft_deploy.families.standins.stand_in import DecoderStandIn


class ChatGLM2StandIn(DecoderStandIn):
    """Shares the parameters of the model it stands for.

    Args:
        model: PaddleNLP's ``ChatGLMv2ForCausalLM``.
    """

    def __init__(self, model: nn.Layer) -> None:
        super().__init__(model)
        config = model.config
        self.heads = config.num_attention_heads
        self.kv_heads = config.multi_query_group_num
        self.head_dim = config.hidden_size // config.num_attention_heads
        decoder = model.chatglm_v2
        # [positions, pairs, 2]: about a quarter as many pairs as a head has dimensions
        table = decoder.rotary_pos_emb(decoder.max_sequence_length).astype("float32")
        cos, sin = table[..., 0].numpy(), table[..., 1].numpy()
        self.rotary = NeighbourRotaryTable(cos, sin)
        self.norm_is_residual = config.apply_residual_connection_post_layernorm

    def _run(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: list[Tensor],
    ) -> list[Tensor]:
        decoder, scope = self.model.chatglm_v2, self.scopes
        with scope("chatglm_v2"):
            with scope("embedding", "word_embeddings"):
                x = F.embedding(input_ids, decoder.embedding.word_embeddings.weight)  # [B, S, E]
            bias = causal_bias(input_ids, attention_mask)
            rotation = self.rotary.at(position_ids)
            presents: list[Tensor] = []
            with scope("encoder"):
                for i, layer in enumerate(decoder.encoder.layers):
                    with scope("layers", str(i)):
                        x, present = self._layer(layer, x, bias, rotation, past[2 * i : 2 * i + 2])
                        presents += present
                if decoder.encoder.post_layer_norm:
                    with scope("final_layernorm"):
                        x = _norm(decoder.encoder.final_layernorm, x)
            with scope("output_layer"):
                logits = paddle.matmul(x, decoder.output_layer.weight)
        return [logits, *presents]

    def _layer(
        self,
        layer: nn.Layer,
        x: Tensor,
        bias: Tensor,
        rotation: tuple[Tensor, Tensor],
        past: list[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        scope = self.scopes
        with scope("input_layernorm"):
            h = _norm(layer.input_layernorm, x)
        out, present = self._attention(layer.self_attention, h, bias, rotation, past)
        x = (h if self.norm_is_residual else x) + out
        with scope("post_attention_layernorm"):
            h = _norm(layer.post_attention_layernorm, x)
        return (h if self.norm_is_residual else x) + self._feed_forward(layer.mlp, h), present

    def _attention(
        self,
        attention: nn.Layer,
        h: Tensor,
        bias: Tensor,
        rotation: tuple[Tensor, Tensor],
        past: list[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        H, K, D = self.heads, self.kv_heads, self.head_dim
        with self.scopes("self_attention"):
            with self.scopes("query_key_value"):
                fused = linear(attention.query_key_value, h)
            q, k, v = (
                split_heads(part, heads, D)
                for part, heads in zip(
                    fused.split([H * D, K * D, K * D], axis=-1), (H, K, K), strict=True
                )
            )
            q, k = self.rotary.rotate(q, *rotation), self.rotary.rotate(k, *rotation)
            out, present = cached_attention(q, k, v, past, bias, scale=D**-0.5)
            with self.scopes("dense"):
                return linear(attention.dense, out), present

    def _feed_forward(self, mlp: nn.Layer, h: Tensor) -> Tensor:
        with self.scopes("mlp"):
            with self.scopes("dense_h_to_4h"):
                fused = linear(mlp.dense_h_to_4h, h)
            gated = silu_gated(*fused.split(2, axis=-1))
            with self.scopes("dense_4h_to_h"):
                return linear(mlp.dense_4h_to_h, gated)


def _norm(layer: nn.Layer, x: Tensor) -> Tensor:
    return rms_norm(x, layer.weight, layer.epsilon)
