"""PaddleNLP's ``LlamaForCausalLM``, computed by the stand-ins."""

from __future__ import annotations

import paddle
from paddle import Tensor, nn
from paddle.nn import functional as F

from peft_deploy.families.standins.attention import causal_bias, grouped_attention, split_heads
from peft_deploy.families.standins.layers import linear, rms_norm, silu_gated
from peft_deploy.families.standins.rotary import RotaryTable
from peft_deploy.families.standins.scope import ScopeTrace


class LlamaStandIn(nn.Layer):  # type: ignore[misc]
    """Shares the parameters of the model it stands for.

    Args:
        model: PaddleNLP's ``LlamaForCausalLM``.
    """

    def __init__(self, model: nn.Layer) -> None:
        super().__init__()
        self.model = model
        self.scopes = ScopeTrace()
        config = model.config
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        half = self.head_dim // 2
        table = model.llama.layers[0].self_attn.rotary_emb  # every layer keeps the same one
        # [1, positions, 1, D], the two halves of D equal
        self.rotary = RotaryTable(
            table.cos_cached[0, :, 0, :half].numpy(), table.sin_cached[0, :, 0, :half].numpy()
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: list[Tensor],
    ) -> list[Tensor]:
        """See ``DecoderFamily.stand_in``."""
        outputs: list[Tensor] = self._run(input_ids, attention_mask, position_ids, past)
        return outputs

    # Without this mark Paddle rewrites the source of everything called here, once for every layer.
    @paddle.jit.not_to_static  # type: ignore[untyped-decorator]
    def _run(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: list[Tensor],
    ) -> list[Tensor]:
        decoder, scope = self.model.llama, self.scopes
        with scope("llama"):
            with scope("embed_tokens"):
                x = F.embedding(input_ids, decoder.embed_tokens.weight)  # [B, S, E]
            bias = causal_bias(input_ids, attention_mask)
            cos, sin = self.rotary.at(position_ids)
            presents: list[Tensor] = []
            for i, layer in enumerate(decoder.layers):
                with scope("layers", str(i)):
                    out, present = self._attention(
                        layer, x, bias, cos, sin, past[2 * i], past[2 * i + 1]
                    )
                    x = x + out
                    x = x + self._feed_forward(layer, x)
                    presents += present
            with scope("norm"):
                x = rms_norm(x, decoder.norm.weight, decoder.norm.variance_epsilon)
        head = self.model.lm_head
        with scope("lm_head"):
            logits = paddle.matmul(x, head.weight, transpose_y=head.transpose_y)
        return [logits, *presents]

    def _attention(
        self,
        layer: nn.Layer,
        x: Tensor,
        bias: Tensor,
        cos: Tensor,
        sin: Tensor,
        past_key: Tensor,
        past_value: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        norm, attention, scope = layer.input_layernorm, layer.self_attn, self.scopes
        with scope("input_layernorm"):
            h = rms_norm(x, norm.weight, norm.variance_epsilon)
        with scope("self_attn"):
            with scope("q_proj"):
                q = linear(attention.q_proj, h)
            with scope("k_proj"):
                k = linear(attention.k_proj, h)
            with scope("v_proj"):
                v = linear(attention.v_proj, h)
            q = self.rotary.rotate(split_heads(q, self.heads, self.head_dim), cos, sin)
            k = self.rotary.rotate(split_heads(k, self.kv_heads, self.head_dim), cos, sin)
            v = split_heads(v, self.kv_heads, self.head_dim)
            k = paddle.concat([past_key, k], 2)  # [B, K, T, D]
            v = paddle.concat([past_value, v], 2)
            out = grouped_attention(q, k, v, bias, scale=self.head_dim**-0.5)
            with scope("o_proj"):
                return linear(attention.o_proj, out), [k, v]

    def _feed_forward(self, layer: nn.Layer, x: Tensor) -> Tensor:
        norm, mlp, scope = layer.post_attention_layernorm, layer.mlp, self.scopes
        with scope("post_attention_layernorm"):
            h = rms_norm(x, norm.weight, norm.variance_epsilon)
        with scope("mlp"):
            with scope("gate_proj"):
                gate = linear(mlp.gate_proj, h)
            with scope("up_proj"):
                up = linear(mlp.up_proj, h)
            gated = silu_gated(gate, up)
            with scope("down_proj"):
                return linear(mlp.down_proj, gated)
