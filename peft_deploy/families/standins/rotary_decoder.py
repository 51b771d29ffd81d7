"""PaddleNLP's Llama and the models built like it, computed by the stand-ins."""

from __future__ import annotations

from collections.abc import Callable

import paddle
from paddle import Tensor, nn
from paddle.nn import functional as F

from peft_deploy.families.standins.attention import cached_attention, causal_bias, split_heads
from peft_deploy.families.standins.layers import linear, rms_norm
from peft_deploy.families.standins.rotary import RotaryTable
from peft_deploy.families.standins.stand_in import DecoderStandIn


class RotaryDecoderStandIn(DecoderStandIn):
    """Shares the parameters of the model it stands for.

    Args:
        model: one of PaddleNLP's ``…ForCausalLM``, whose modules are called as Llama's.
        body: the bare model's name within it.
        activation: of the gate.
        norm_offset: is added to the weights of the norms.
        embedding_scale: factor of the embeddings.
    """

    def __init__(
        self,
        model: nn.Layer,
        body: str,
        *,
        activation: Callable[[Tensor], Tensor] = F.silu,
        norm_offset: float = 0.0,
        embedding_scale: float = 1.0,
    ) -> None:
        super().__init__(model)
        self.body = body
        self.activation = activation
        self.norm_offset = norm_offset
        self.embedding_scale = embedding_scale
        config, decoder = model.config, getattr(model, body)
        attention = decoder.layers[0].self_attn
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = attention.head_dim
        self.tied = config.tie_word_embeddings
        self.rotary = _table(attention.rotary_emb, config.max_position_embeddings, self.head_dim)

    def _run(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: list[Tensor],
    ) -> list[Tensor]:
        decoder, scope = getattr(self.model, self.body), self.scopes
        with scope(self.body):
            with scope("embed_tokens"):
                x = self._embed(decoder.embed_tokens, input_ids)
            bias = causal_bias(input_ids, attention_mask)
            cos, sin = self.rotary.at(position_ids)
            presents: list[Tensor] = []
            for i, layer in enumerate(decoder.layers):
                with scope("layers", str(i)):
                    out, present = self._attention(
                        layer, x, bias, cos, sin, past[2 * i : 2 * i + 2]
                    )
                    x = x + out
                    x = x + self._feed_forward(layer, x)
                    presents += present
            with scope("norm"):
                x = self._norm(decoder.norm, x)
        with scope("lm_head"):
            logits = paddle.matmul(x, self.model.lm_head.weight, transpose_y=self.tied)
        return [logits, *presents]

    def _embed(self, table: nn.Layer, input_ids: Tensor) -> Tensor:
        """[B, S] → [B, S, E]."""
        x = F.embedding(input_ids, table.weight)
        if table._padding_idx is not None:  # Paddle gives zeros for it, whatever the table holds
            padding = paddle.full([1], table._padding_idx % table.weight.shape[0], "int64")
            x = x * paddle.not_equal(input_ids, padding).cast("float32").unsqueeze(-1)
        return x if self.embedding_scale == 1.0 else x * self.embedding_scale

    def _norm(self, norm: nn.Layer, x: Tensor) -> Tensor:
        weight = norm.weight
        if self.norm_offset:  # a Python number would be added as 1 * weight + number
            weight = weight + paddle.full([1], self.norm_offset)
        return rms_norm(x, weight, norm.variance_epsilon)

    def _attention(
        self,
        layer: nn.Layer,
        x: Tensor,
        bias: Tensor,
        cos: Tensor,
        sin: Tensor,
        past: list[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        attention, scope = layer.self_attn, self.scopes
        with scope("input_layernorm"):
            h = self._norm(layer.input_layernorm, x)
        with scope("self_attn"):
            q, k, v = self._heads(attention, h)
            q, k = self.rotary.rotate(q, cos, sin), self.rotary.rotate(k, cos, sin)
            out, present = cached_attention(q, k, v, past, bias, scale=self.head_dim**-0.5)
            with scope("o_proj"):
                return linear(attention.o_proj, out), present

    def _heads(self, attention: nn.Layer, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, S, D], keys and values [B, K, S, D], before rotation."""
        H, K, D, scope = self.heads, self.kv_heads, self.head_dim, self.scopes
        if hasattr(attention, "qkv_proj"):
            with scope("qkv_proj"):
                fused = linear(attention.qkv_proj, h)
            # Every kv head is followed by nothing of another one: its H/K queries, its key, its value.
            groups = fused.reshape([0, 0, K, (H // K + 2) * D])
            q, k, v = groups.split([H // K * D, D, D], axis=-1)  # [B, S, K, …]
            k, v = k.transpose([0, 2, 1, 3]), v.transpose([0, 2, 1, 3])
            return (
                split_heads(q, H, D),
                k,
                v,
            )  # a reshape lets the groups of queries follow each other
        with scope("q_proj"):
            q = linear(attention.q_proj, h)
        with scope("k_proj"):
            k = linear(attention.k_proj, h)
        with scope("v_proj"):
            v = linear(attention.v_proj, h)
        return split_heads(q, H, D), split_heads(k, K, D), split_heads(v, K, D)

    def _feed_forward(self, layer: nn.Layer, x: Tensor) -> Tensor:
        mlp, scope = layer.mlp, self.scopes
        with scope("post_attention_layernorm"):
            h = self._norm(layer.post_attention_layernorm, x)
        with scope("mlp"):
            if hasattr(mlp, "gate_up_fused_proj"):
                with scope("gate_up_fused_proj"):
                    gate, up = linear(mlp.gate_up_fused_proj, h).split(2, axis=-1)
            else:
                with scope("gate_proj"):
                    gate = linear(mlp.gate_proj, h)
                with scope("up_proj"):
                    up = linear(mlp.up_proj, h)
            gated = self.activation(gate) * up
            with scope("down_proj"):
                return linear(mlp.down_proj, gated)


def _table(rotary: nn.Layer, max_positions: int, head_dim: int) -> RotaryTable:
    """The layer's own numbers, for every position that its table has."""
    length = int(getattr(rotary, "max_seq_len_cached", max_positions))
    cos, sin = rotary(paddle.zeros([1]), seq_len=length)  # the two halves of D are equal
    half = head_dim // 2
    cos, sin = (t.reshape([-1, head_dim])[:, :half].numpy() for t in (cos, sin))
    return RotaryTable(cos, sin)
