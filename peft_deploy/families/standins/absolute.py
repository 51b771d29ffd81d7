"""Decoders with learned absolute positions: PaddleNLP's GPT and OPT, whose layers have the same parts and names."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import paddle
from paddle import Tensor, nn
from paddle.nn import functional as F

from peft_deploy.families.standins.attention import (
    cached_attention,
    causal_bias,
    split_fused_heads,
    split_heads,
)
from peft_deploy.families.standins.layers import gelu_tanh, layer_norm, linear
from peft_deploy.families.standins.stand_in import DecoderStandIn

# PaddleNLP's "gelu" is the tanh form in both models.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
}


class AbsoluteDecoder(DecoderStandIn):
    """The layers; a subclass says what comes before and after them.

    Args:
        model: PaddleNLP's causal language model, whose parameters are shared.
        layers: the path of the list of its layers.
        activation: a key of :data:`ACTIVATIONS`.
        scale: factor of the attention scores.
    """

    def __init__(self, model: nn.Layer, layers: str, activation: str, scale: float) -> None:
        super().__init__(model)
        self.layers_path = layers.split(".")
        self.activation = ACTIVATIONS[activation]
        self.scale = scale
        self.heads = model.config.num_attention_heads
        self.head_dim = model.config.hidden_size // self.heads
        self.pre_norm = model.config.normalize_before
        self.fused = model.config.fuse_attention_qkv

    @abstractmethod
    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """What the first layer gets, [B, S, E]."""

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """[B, S, V] from what the last layer gives, [B, S, E]."""

    def _run(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: list[Tensor],
    ) -> list[Tensor]:
        x = self.embed(input_ids, position_ids)
        bias = causal_bias(input_ids, attention_mask)
        presents: list[Tensor] = []
        layers = self.model
        for name in self.layers_path:
            layers = getattr(layers, name)
        for i, layer in enumerate(layers):
            with self.scopes(*self.layers_path, str(i)):
                x, present = self._layer(layer, x, bias, past[2 * i : 2 * i + 2])
                presents += present
        return [self.logits(x), *presents]

    def _layer(
        self, layer: nn.Layer, x: Tensor, bias: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Norms before attention and feed-forward block, or after each of the two sums."""
        h = self._norm(layer, "norm1", x) if self.pre_norm else x
        out, present = self._attention(layer.self_attn, h, bias, past)
        x = x + out
        x = x if self.pre_norm else self._norm(layer, "norm1", x)
        h = self._norm(layer, "norm2", x) if self.pre_norm else x
        x = x + self._feed_forward(layer, h)
        return x if self.pre_norm else self._norm(layer, "norm2", x), present

    def _norm(self, layer: nn.Layer, name: str, x: Tensor) -> Tensor:
        with self.scopes(name):
            return layer_norm(getattr(layer, name), x)

    def _project(self, layer: nn.Layer, name: str, x: Tensor) -> Tensor:
        with self.scopes(name):
            return linear(getattr(layer, name), x)

    def _attention(
        self, attention: nn.Layer, h: Tensor, bias: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        with self.scopes("self_attn"):
            if self.fused:
                fused = self._project(attention, "qkv_proj", h)
                q, k, v = split_fused_heads(fused, self.heads, self.head_dim)
            else:
                q, k, v = (
                    split_heads(self._project(attention, name, h), self.heads, self.head_dim)
                    for name in ("q_proj", "k_proj", "v_proj")
                )
            out, present = cached_attention(q, k, v, past, bias, scale=self.scale)
            return self._project(attention, "out_proj", out), present

    def _feed_forward(self, layer: nn.Layer, h: Tensor) -> Tensor:
        return self._project(layer, "linear2", self.activation(self._project(layer, "linear1", h)))


class GPTStandIn(AbsoluteDecoder):
    """PaddleNLP's ``GPTForCausalLM``."""

    def __init__(self, model: nn.Layer) -> None:
        config = model.config
        head_dim = config.hidden_size // config.num_attention_heads
        # PaddleNLP scales queries down and scores up again, against overflow in half precision.
        scale = (config.scale_qk_coeff * head_dim) ** -0.5 * config.scale_qk_coeff
        super().__init__(model, "gpt.decoder.layers", config.hidden_activation, scale)

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """See :class:`AbsoluteDecoder`."""
        embeddings = self.model.gpt.embeddings
        with self.scopes("gpt", "embeddings"):
            with self.scopes("word_embeddings"):
                x = F.embedding(input_ids, embeddings.word_embeddings.weight)
            with self.scopes("position_embeddings"):
                return x + F.embedding(position_ids, embeddings.position_embeddings.weight)

    def logits(self, x: Tensor) -> Tensor:
        """See :class:`AbsoluteDecoder`."""
        with self.scopes("gpt", "decoder"):
            x = self._norm(self.model.gpt.decoder, "norm", x)
        with self.scopes("lm_head"):
            return paddle.matmul(x, self.model.lm_head.weight, transpose_y=True)


class OPTStandIn(AbsoluteDecoder):
    """PaddleNLP's ``OPTForCausalLM``."""

    def __init__(self, model: nn.Layer) -> None:
        config = model.config
        scale = (config.hidden_size // config.num_attention_heads) ** -0.5
        super().__init__(model, "opt.decoder.layers", config.hidden_act, scale)

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """See :class:`AbsoluteDecoder`."""
        embeddings = self.model.opt.embeddings
        with self.scopes("opt", "embeddings"):
            with self.scopes("word_embeddings"):
                x = F.embedding(input_ids, embeddings.word_embeddings.weight)
            if embeddings.project_in is not None:
                x = self._project(embeddings, "project_in", x)
            table = embeddings.position_embeddings
            with self.scopes("position_embeddings"):
                # An addition of a Python number would be done in float32.
                rows = position_ids + paddle.full([1], table.offset, "int64")
                return x + F.embedding(rows, table.weight)

    def logits(self, x: Tensor) -> Tensor:
        """See :class:`AbsoluteDecoder`."""
        decoder = self.model.opt.decoder
        with self.scopes("opt", "decoder"):
            if decoder.final_layer_norm is not None:
                x = self._norm(decoder, "final_layer_norm", x)
            if decoder.project_out is not None:
                x = self._project(decoder, "project_out", x)
        with self.scopes("lm_head"):
            return paddle.matmul(x, self.model.lm_head.decoder_weight, transpose_y=True)
