"""PaddleNLP's T5, computed by the stand-ins: the encoder and the decoder, each a graph of its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import paddle
from paddle import Tensor, nn
from paddle.nn import functional as F

from peft_deploy.families.standins.attention import (
    MASKED,
    causal_bias,
    grouped_attention,
    split_heads,
)
from peft_deploy.families.standins.layers import gelu_tanh, linear, rms_norm
from peft_deploy.families.standins.positions import tokens_up_to
from peft_deploy.families.standins.stand_in import StandIn

_GATES: dict[str, Callable[[Tensor], Tensor]] = {"gated-gelu": gelu_tanh, "gated-silu": F.silu}


class _T5StandIn(StandIn):
    """What encoder and decoder have in common. Shares the parameters of the model it stands for.

    Args:
        model: PaddleNLP's model.
        stack: the encoder or the decoder in it.
        path: of the stack in the model.
        relative: every difference between a key's and a query's place that is told from others, ascending.
    """

    def __init__(
        self, model: nn.Layer, stack: nn.Layer, path: str, relative: npt.NDArray[np.int64]
    ) -> None:
        super().__init__(model)
        self._stack = [stack]  # in a list: it is part of the model already
        self._path = path.split(".")
        self._heads = model.config.num_heads
        self._head_dim = model.config.d_kv
        self._gate = _GATES.get(model.config.feed_forward_proj)
        self._first, self._last = int(relative[0]), int(relative[-1])
        attention = stack.block[0].layer[0].SelfAttention
        # PaddleNLP's own numbers: logarithms in float32 fall on either side of a bucket's edge.
        self._buckets = attention._relative_position_bucket(
            paddle.to_tensor(relative),
            bidirectional=not attention.is_decoder,
            num_buckets=attention.relative_attention_num_buckets,
        ).numpy()

    def _embed(self, input_ids: Tensor) -> Tensor:
        with self.scopes("t5", "shared"):
            return F.embedding(input_ids, self.model.t5.shared.weight)  # [B, S, E]

    def _position_bias(self, queries: Tensor, keys: Tensor) -> Tensor:
        """What the distance of tokens adds to their scores, [B, H, S, T].

        Args:
            queries: places among real tokens, [B, S].
            keys: likewise, [B, T].
        """
        weight = self._stack[0].block[0].layer[0].SelfAttention.relative_attention_bias.weight
        scope = (*self._path, "block", "0", "layer", "0", "SelfAttention")
        with self.scopes(*scope, "relative_attention_bias"):
            rows = F.embedding(paddle.to_tensor(self._buckets), weight)  # [distances, H]
            far = paddle.full([1], self._last, dtype="int64")
            near = paddle.full([1], self._first, dtype="int64")
            distance = keys.unsqueeze(1) - queries.unsqueeze(-1)  # [B, S, T]
            distance = paddle.maximum(paddle.minimum(distance, far), near) - near
            return F.embedding(distance, rows).transpose([0, 3, 1, 2])

    def _norm(self, layer: nn.Layer, x: Tensor) -> Tensor:
        with self.scopes("layer_norm"):
            return rms_norm(x, layer.weight, layer.variance_epsilon)

    def _split(self, attention: nn.Layer, names: str, x: Tensor) -> list[Tensor]:
        """Projections of x [B, S, E], one a letter of ``names``: [B, H, S, D] each."""
        parts = []
        for name in names:
            with self.scopes(name):
                projected = linear(getattr(attention, name), x)
                parts.append(split_heads(projected, self._heads, self._head_dim))
        return parts

    def _attend(self, attention: nn.Layer, parts: list[Tensor], bias: Tensor) -> Tensor:
        q, k, v = parts
        out = grouped_attention(q, k, v, bias, scale=1.0)  # T5's weights are trained without one
        with self.scopes("o"):
            return linear(attention.o, out)

    def _feed_forward(self, layer: nn.Layer, x: Tensor) -> Tensor:
        scope, dense = self.scopes, layer.DenseReluDense
        h = self._norm(layer.layer_norm, x)
        with scope("DenseReluDense"):
            if self._gate is None:
                with scope("wi"):
                    h = F.relu(linear(dense.wi, h))
            else:
                with scope("wi_0"):
                    gate = self._gate(linear(dense.wi_0, h))
                with scope("wi_1"):
                    h = gate * linear(dense.wi_1, h)
            with scope("wo"):
                return x + linear(dense.wo, h)

    def _final(self, x: Tensor) -> Tensor:
        with self.scopes(*self._path, "final_layer_norm"):
            norm = self._stack[0].final_layer_norm
            return rms_norm(x, norm.weight, norm.variance_epsilon)


class T5EncoderStandIn(_T5StandIn):
    """Reads a source text, and projects it to the keys and values of the decoder's cross-attention.

    Args:
        model: PaddleNLP's model.
        max_distance: from which on all distances are alike.
    """

    def __init__(self, model: nn.Layer, max_distance: int) -> None:
        both_ways = np.arange(-max_distance, max_distance + 1, dtype=np.int64)
        super().__init__(model, model.t5.encoder, "t5.encoder", both_ways)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
        """See ``EncoderDecoderFamily.encoder_stand_in``."""
        outputs: list[Tensor] = self.traced(input_ids, attention_mask)
        return outputs

    def _run(self, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
        x = self._embed(input_ids)
        places = attention_mask.cumsum(-1)  # [B, S]
        bias = self._position_bias(places, places) + source_bias(attention_mask)
        for i, block in enumerate(self._stack[0].block):
            with self.scopes(*self._path, "block", str(i), "layer"):
                with self.scopes("0"):
                    h = self._norm(block.layer[0].layer_norm, x)
                    with self.scopes("SelfAttention"):
                        attention = block.layer[0].SelfAttention
                        x = x + self._attend(attention, self._split(attention, "qkv", h), bias)
                with self.scopes("1"):
                    x = self._feed_forward(block.layer[1], x)
        x = self._final(x)
        projected = []
        for i, block in enumerate(self.model.t5.decoder.block):
            with self.scopes("t5", "decoder", "block", str(i), "layer", "1", "EncDecAttention"):
                projected += self._split(block.layer[1].EncDecAttention, "kv", x)
        return projected


class T5DecoderStandIn(_T5StandIn):
    """Writes behind what it has written, looking at the source's keys and values.

    Args:
        model: PaddleNLP's model.
        max_distance: from which on all distances are alike.
    """

    def __init__(self, model: nn.Layer, max_distance: int) -> None:
        backwards = np.arange(-max_distance, 1, dtype=np.int64)
        super().__init__(model, model.t5.decoder, "t5.decoder", backwards)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        encoder_attention_mask: Tensor,
        cross: list[Tensor],
        past: list[Tensor],
    ) -> list[Tensor]:
        """See ``Family.stand_in``."""
        outputs: list[Tensor] = self.traced(
            input_ids, attention_mask, encoder_attention_mask, cross, past
        )
        return outputs

    def _run(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        encoder_attention_mask: Tensor,
        cross: list[Tensor],
        past: list[Tensor],
    ) -> list[Tensor]:
        x = self._embed(input_ids)
        queries = tokens_up_to(input_ids, attention_mask)
        bias = self._position_bias(queries, attention_mask.cumsum(-1))  # [B, H, S, T]
        bias = bias + causal_bias(input_ids, attention_mask)
        source = source_bias(encoder_attention_mask)
        present = []
        for i, block in enumerate(self._stack[0].block):
            with self.scopes(*self._path, "block", str(i), "layer"):
                with self.scopes("0"):
                    x, k, v = self._self_attention(
                        block.layer[0], x, past[2 * i : 2 * i + 2], bias
                    )
                present += [k, v]
                with self.scopes("1"):
                    x = self._cross_attention(block.layer[1], x, cross[2 * i : 2 * i + 2], source)
                with self.scopes("2"):
                    x = self._feed_forward(block.layer[2], x)
        return [self._logits(self._final(x)), *present]

    def _self_attention(
        self, layer: nn.Layer, x: Tensor, past: list[Tensor], bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        h, attention = self._norm(layer.layer_norm, x), layer.SelfAttention
        with self.scopes("SelfAttention"):
            q, k, v = self._split(attention, "qkv", h)
            k = paddle.concat([past[0], k], axis=2)  # [B, H, T, D]
            v = paddle.concat([past[1], v], axis=2)
            return x + self._attend(attention, [q, k, v], bias), k, v

    def _cross_attention(
        self, layer: nn.Layer, x: Tensor, source: list[Tensor], bias: Tensor
    ) -> Tensor:
        h, attention = self._norm(layer.layer_norm, x), layer.EncDecAttention
        with self.scopes("EncDecAttention"):
            (q,) = self._split(attention, "q", h)
            return x + self._attend(attention, [q, *source], bias)

    def _logits(self, x: Tensor) -> Tensor:
        with self.scopes("lm_head"):
            if not self.model.config.tie_word_embeddings:
                return linear(self.model.lm_head, x)
            x = x * self.model.config.d_model**-0.5
            return paddle.matmul(x, self.model.t5.shared.weight, transpose_y=True)


def source_bias(attention_mask: Tensor) -> Tensor:
    """0 where a source has a token and :data:`MASKED` where it has padding: [B, 1, 1, source]."""
    return (attention_mask.cast("float32").unsqueeze([1, 2]) - 1.0) * -MASKED
