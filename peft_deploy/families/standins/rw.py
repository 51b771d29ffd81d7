"""PaddleNLP's ``RWForCausalLM``, computed by the stand-ins."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import paddle
from paddle import Tensor, nn
from paddle.nn import functional as F

from peft_deploy.families.standins.attention import (
    alibi_bias,
    alibi_slopes,
    cached_attention,
    causal_bias,
    split_fused_heads,
    split_heads,
)
from peft_deploy.families.standins.layers import layer_norm, linear
from peft_deploy.families.standins.rotary import RotaryTable
from peft_deploy.families.standins.stand_in import DecoderStandIn, StandIn


def coarse_slopes(heads: int) -> npt.NDArray[np.float32]:
    """The slopes of ALiBi as PaddleNLP's RW has them, rounded to bfloat16: [H]."""
    rounded = paddle.to_tensor(alibi_slopes(heads)).cast("bfloat16").cast("float32")
    slopes: npt.NDArray[np.float32] = rounded.numpy()
    return slopes


class _Falcon(StandIn):
    """Shares the parameters of the model it stands for."""

    def __init__(self, model: nn.Layer) -> None:
        super().__init__(model)
        config = model.config
        self.heads = config.n_head
        self.head_dim = config.hidden_size // config.n_head
        self.scale = self.head_dim**-0.5
        self.multi_query, self.parallel = config.multi_query, config.parallel_attn
        self.rotary = None
        if config.alibi:
            # PaddleNLP scales what ALiBi adds together with the scores.
            self.slopes = coarse_slopes(self.heads) * np.float32(self.scale)
        else:
            half = self.head_dim // 2
            layer = model.transformer.h[0].self_attention.maybe_rotary
            cos, sin = layer.cos_sin(config.max_position_embeddings, paddle.float32)
            self.rotary = RotaryTable(cos[0, :, :half].numpy(), sin[0, :, :half].numpy())

    def _run(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None,
        past: list[Tensor],
    ) -> list[Tensor]:
        decoder, scope = self.model.transformer, self.scopes
        with scope("transformer"):
            with scope("word_embeddings"):
                x = F.embedding(input_ids, decoder.word_embeddings.weight)  # [B, S, E]
            bias, rotation = causal_bias(input_ids, attention_mask), None
            if self.rotary is not None:
                rotation = self.rotary.at(position_ids)
            else:
                bias = bias + alibi_bias(attention_mask, self.slopes)  # [B, H, S, T]
            presents: list[Tensor] = []
            for i, layer in enumerate(decoder.h):
                with scope("h", str(i)):
                    x, present = self._layer(layer, x, bias, rotation, past[2 * i : 2 * i + 2])
                    presents += present
            with scope("ln_f"):
                x = layer_norm(decoder.ln_f, x)
        with scope("lm_head"):
            logits = paddle.matmul(x, self.model.lm_head.weight, transpose_y=True)
        return [logits, *presents]

    def _layer(
        self,
        layer: nn.Layer,
        x: Tensor,
        bias: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        past: list[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        with self.scopes("input_layernorm"):
            h = layer_norm(layer.input_layernorm, x)
        out, present = self._attention(layer.self_attention, h, bias, rotation, past)
        x = x + out
        if not self.parallel:
            with self.scopes("post_attention_layernorm"):
                h = layer_norm(layer.post_attention_layernorm, x)
        return x + self._feed_forward(layer.mlp, h), present

    def _attention(
        self,
        attention: nn.Layer,
        h: Tensor,
        bias: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        past: list[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        with self.scopes("self_attention"):
            with self.scopes("query_key_value"):
                fused = linear(attention.query_key_value, h)
            q, k, v = self._split(fused)
            if self.rotary is not None and rotation is not None:
                q, k = self.rotary.rotate(q, *rotation), self.rotary.rotate(k, *rotation)
            out, present = cached_attention(q, k, v, past, bias, scale=self.scale)
            with self.scopes("dense"):
                return linear(attention.dense, out), present

    def _split(self, fused: Tensor) -> list[Tensor]:
        """Query [B, H, S, D], key and value [B, K, S, D]."""
        if not self.multi_query:
            return split_fused_heads(fused, self.heads, self.head_dim)
        H, D = self.heads, self.head_dim
        parts = fused.split([H * D, D, D], axis=-1)  # the kv head comes last
        return [split_heads(part, heads, D) for part, heads in zip(parts, (H, 1, 1), strict=True)]

    def _feed_forward(self, mlp: nn.Layer, h: Tensor) -> Tensor:
        with self.scopes("mlp"):
            with self.scopes("dense_h_to_4h"):
                h = linear(mlp.dense_h_to_4h, h)
            h = F.gelu(h)
            with self.scopes("dense_4h_to_h"):
                return linear(mlp.dense_4h_to_h, h)


class FalconStandIn(_Falcon, DecoderStandIn):
    """A model with rotary positions.

    Args:
        model: PaddleNLP's ``RWForCausalLM``.
    """


class FalconAlibiStandIn(_Falcon):
    """A model with ALiBi, whose graph has no ``position_ids``.

    Args:
        model: PaddleNLP's ``RWForCausalLM`` with ``alibi``.
    """

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past: list[Tensor]
    ) -> list[Tensor]:
        """See ``Family.stand_in``."""
        outputs: list[Tensor] = self.traced(input_ids, attention_mask, None, past)
        return outputs
