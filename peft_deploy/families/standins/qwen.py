"""PaddleNLP's ``QWenForCausalLM``, computed by the stand-ins."""

from __future__ import annotations

import paddle
from paddle import Tensor, nn
from paddle.nn import functional as F

from peft_deploy.families.standins.attention import cached_attention, causal_bias, split_heads
from peft_deploy.families.standins.layers import linear, rms_norm, silu_gated
from peft_deploy.families.standins.positions import tokens_up_to
from peft_deploy.families.standins.rotary import RotaryTable
from peft_deploy.families.standins.stand_in import DecoderStandIn


class QwenStandIn(DecoderStandIn):
    """Shares the parameters of the model it stands for.

    Args:
        model: PaddleNLP's ``QWenForCausalLM``.
        positions: length of the table of rotations.
    """

    def __init__(self, model: nn.Layer, positions: int) -> None:
        super().__init__(model)
        self.heads = model.config.num_attention_heads
        self.head_dim = model.config.hidden_size // self.heads
        half = self.head_dim // 2
        attention = model.qwen.h[0].attn  # every layer keeps the same tables
        cos, sin = attention.rotary_emb(paddle.zeros([1]), positions)  # [1, positions, 1, D]
        self.rotary = RotaryTable(cos[0, :, 0, :half].numpy(), sin[0, :, 0, :half].numpy())
        self.logn = model.config.use_logn_attn
        if self.logn:
            # Row n is the factor of the n-th real token; row 0 is for padding before the first.
            factors = attention.logn_tensor.reshape([-1, 1]).astype("float32")
            self.register_buffer(
                "factors", paddle.concat([paddle.ones([1, 1]), factors]), persistable=False
            )

    def _run(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: list[Tensor],
    ) -> list[Tensor]:
        decoder, scope = self.model.qwen, self.scopes
        with scope("qwen"):
            with scope("wte"):
                x = F.embedding(input_ids, decoder.wte.weight)  # [B, S, E]
            bias = causal_bias(input_ids, attention_mask)
            cos, sin = self.rotary.at(position_ids)
            factor = None
            if self.logn:
                counts = tokens_up_to(input_ids, attention_mask)  # [B, S]
                factor = F.embedding(counts, self.factors).unsqueeze(1)  # [B, 1, S, 1]
            presents: list[Tensor] = []
            for i, layer in enumerate(decoder.h):
                with scope("h", str(i)):
                    out, present = self._attention(
                        layer, x, bias, (cos, sin), factor, past[2 * i : 2 * i + 2]
                    )
                    x = x + out
                    x = x + self._feed_forward(layer, x)
                    presents += present
            with scope("ln_f"):
                x = rms_norm(x, decoder.ln_f.weight, decoder.ln_f.eps)
        with scope("lm_head"):
            logits = paddle.matmul(x, self.model.lm_head.weight)
        return [logits, *presents]

    def _attention(
        self,
        layer: nn.Layer,
        x: Tensor,
        bias: Tensor,
        rotation: tuple[Tensor, Tensor],
        factor: Tensor | None,
        past: list[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        scope = self.scopes
        with scope("ln_1"):
            h = rms_norm(x, layer.ln_1.weight, layer.ln_1.eps)
        with scope("attn"):
            with scope("c_attn"):
                fused = linear(layer.attn.c_attn, h)
            q, k, v = (
                split_heads(part, self.heads, self.head_dim) for part in fused.split(3, axis=-1)
            )
            q, k = self.rotary.rotate(q, *rotation), self.rotary.rotate(k, *rotation)
            if factor is not None:
                q = q * factor
            out, present = cached_attention(q, k, v, past, bias, scale=self.head_dim**-0.5)
            with scope("c_proj"):
                return linear(layer.attn.c_proj, out), present

    def _feed_forward(self, layer: nn.Layer, x: Tensor) -> Tensor:
        mlp, scope = layer.mlp, self.scopes
        with scope("ln_2"):
            h = rms_norm(x, layer.ln_2.weight, layer.ln_2.eps)
        with scope("mlp"):
            with scope("w1"):
                up = linear(mlp.w1, h)
            with scope("w2"):
                gate = linear(mlp.w2, h)
            gated = silu_gated(gate, up)
            with scope("c_proj"):
                return linear(mlp.c_proj, gated)
