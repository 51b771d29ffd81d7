"""PaddleNLP's BERT, ERNIE and RoBERTa with any of their heads, computed by the stand-ins."""

from __future__ import annotations

from collections.abc import Callable

import paddle
from paddle import Tensor, nn
from paddle.nn import functional as F

from peft_deploy.families.pooling import Pooling
from peft_deploy.families.standins.attention import grouped_attention, split_heads
from peft_deploy.families.standins.layers import layer_norm, linear
from peft_deploy.families.standins.stand_in import StandIn

# What PaddleNLP's encoders add to a masked score. Scores are far smaller, so that softmax gives masked tokens
# exactly 0; in a row that is all padding it is the same for all of them, and so changes nothing.
MASKED = -1e4
_LEAST_LENGTH = 1e-12  # below it a vector is not normalized, as in torch's `normalize`


def set_epsilon(model: nn.Layer, epsilon: float) -> None:
    """What every layer norm of the model adds to the variance."""
    for layer in model.sublayers():
        if isinstance(layer, nn.LayerNorm):
            layer._epsilon = epsilon


class EncoderStandIn(StandIn):
    """Shares the parameters of the model it stands for.

    Args:
        model: PaddleNLP's model.
        encoder: the encoder in it, or the model itself.
        head: what stands on top: ``embedding``, ``sequence``, ``tokens``, ``answer`` or ``masked``.
        pooling: of sentence embeddings; None to leave them out.
    """

    def __init__(
        self, model: nn.Layer, encoder: nn.Layer, head: str, pooling: Pooling | None
    ) -> None:
        super().__init__(model)
        self._path = () if encoder is model else (model.base_model_prefix,)
        self._encoder = [encoder]  # in a list: it is part of the model already
        self._head = head
        self._pooling = pooling
        config = model.config
        self._heads = config.num_attention_heads
        self._head_dim = config.hidden_size // config.num_attention_heads
        self._task = config.task_id if getattr(config, "use_task_id", False) else None
        self._activation: Callable[[Tensor], Tensor] = getattr(F, config.hidden_act)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> list[Tensor]:
        """See ``Family.stand_in``."""
        outputs: list[Tensor] = self.traced(input_ids, attention_mask, token_type_ids)
        return outputs

    def _run(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None
    ) -> list[Tensor]:
        encoder, scope = self._encoder[0], self.scopes
        S = paddle.shape(input_ids)[1].cast("int64")
        places = paddle.arange(0, S, dtype="int64").unsqueeze(0)  # [1, S]
        lead = paddle.argmax(
            attention_mask, axis=1, keepdim=True
        )  # [B, 1], of the first real token
        keep = attention_mask.cast("float32")  # [B, S]
        bias = (keep.unsqueeze([1, 2]) - 1.0) * -MASKED  # [B, 1, 1, S]
        with scope(*self._path):
            with scope("embeddings"):
                positions = self._positions(input_ids, places, lead)
                x = self._embed(encoder.embeddings, input_ids, positions, token_type_ids)
            with scope("encoder"):
                for i, layer in enumerate(encoder.encoder.layers):
                    with scope("layers", str(i)):
                        x = self._layer(layer, x, bias)
        first = paddle.equal(places, lead).cast("float32").unsqueeze(1)  # [B, 1, S]
        return self._outputs(encoder, x, keep, first)

    def _positions(self, input_ids: Tensor, places: Tensor, lead: Tensor) -> Tensor:
        """The position of every token, [B, S], counted from the first real one of its row."""
        return paddle.maximum(places - lead, paddle.zeros([1], dtype="int64"))

    def _embed(
        self, layer: nn.Layer, input_ids: Tensor, positions: Tensor, token_type_ids: Tensor | None
    ) -> Tensor:
        words = layer.word_embeddings
        x = F.embedding(input_ids, words.weight)  # [B, S, E]
        padding = words._padding_idx
        # Paddle's layer gives zeros there, whatever the weight holds.
        if padding not in (None, -1):
            real = paddle.not_equal(input_ids, paddle.full([1], padding, dtype="int64"))
            x = x * real.cast("float32").unsqueeze(-1)
        x = x + F.embedding(positions, layer.position_embeddings.weight)
        if token_type_ids is not None:
            x = x + F.embedding(token_type_ids, layer.token_type_embeddings.weight)
        elif hasattr(layer, "token_type_embeddings"):
            x = x + layer.token_type_embeddings.weight[0]
        if self._task is not None:
            x = x + layer.task_type_embeddings.weight[self._task]
        with self.scopes("layer_norm"):
            return layer_norm(layer.layer_norm, x)

    def _layer(self, layer: nn.Layer, x: Tensor, bias: Tensor) -> Tensor:
        attention, scope = layer.self_attn, self.scopes
        with scope("self_attn"):
            parts = []
            for name in ("q_proj", "k_proj", "v_proj"):
                with scope(name):
                    parts.append(linear(getattr(attention, name), x))
            q, k, v = (split_heads(part, self._heads, self._head_dim) for part in parts)
            out = grouped_attention(q, k, v, bias, scale=self._head_dim**-0.5)
            with scope("out_proj"):
                out = linear(attention.out_proj, out)
        with scope("norm1"):
            x = layer_norm(layer.norm1, x + out)
        with scope("linear1"):
            h = self._activation(linear(layer.linear1, x))
        with scope("linear2"):
            h = linear(layer.linear2, h)
        with scope("norm2"):
            return layer_norm(layer.norm2, x + h)

    def _outputs(self, encoder: nn.Layer, x: Tensor, keep: Tensor, first: Tensor) -> list[Tensor]:
        """The head's outputs from hidden states x [B, S, E], mask [B, S] and the first token's place [B, 1, S]."""
        if self._head == "embedding":
            pooled = [] if self._pooling is None else [self._pool(x, keep, first)]
            return [paddle.assign(x), *pooled]
        if self._head == "sequence":
            return [self._classify(encoder, paddle.matmul(first, x).squeeze(1))]
        if self._head == "masked":
            return [self._predict(x)]
        with self.scopes("classifier"):
            scores = linear(self.model.classifier, x)
        if self._head == "tokens":
            return [scores]
        return [part.squeeze(-1) for part in scores.split(2, axis=-1)]

    def _pool(self, x: Tensor, keep: Tensor, first: Tensor) -> Tensor:
        """One vector a text, [B, E]."""
        pooling = self._pooling
        assert pooling is not None
        with self.scopes("pooling"):
            if pooling.mode == "cls":
                pooled = paddle.matmul(first, x).squeeze(1)
            else:
                least = paddle.ones([1], dtype="float32")  # a row that is all padding gives zeros
                count = paddle.maximum(keep.sum(-1, keepdim=True), least)  # [B, 1]
                pooled = paddle.matmul(keep.unsqueeze(1), x).squeeze(1) / count
            if pooling.normalize:
                least = paddle.full([1], _LEAST_LENGTH, dtype="float32")
                length = paddle.sqrt((pooled * pooled).sum(-1, keepdim=True))
                pooled = pooled / paddle.maximum(length, least)
            return pooled

    def _classify(self, encoder: nn.Layer, first: Tensor) -> Tensor:
        """Scores of classes, [B, C], from the first token's hidden state [B, E]."""
        scope, pooler = self.scopes, encoder.pooler
        with scope(*self._path, "pooler", "dense"):
            pooled = linear(pooler.dense, first)
            if getattr(pooler, "pool_act", "tanh") == "tanh":
                pooled = paddle.tanh(pooled)
        with scope("classifier"):
            return linear(self.model.classifier, pooled)

    def _predict(self, x: Tensor) -> Tensor:
        """Scores of the vocabulary, [B, S, V]."""
        head, scope = self.model.cls.predictions, self.scopes
        with scope("cls", "predictions"):
            with scope("transform"):
                h = self._activation(linear(head.transform, x))
            with scope("layer_norm"):
                h = layer_norm(head.layer_norm, h)
            with scope("decoder"):
                return paddle.matmul(h, head.decoder.weight, transpose_y=True) + head.decoder_bias


class RobertaStandIn(EncoderStandIn):
    """The same with RoBERTa's positions and heads."""

    def _positions(self, input_ids: Tensor, places: Tensor, lead: Tensor) -> Tensor:
        """See there: tokens are counted from pad + 1 on, and all of padding is at position pad."""
        pad = paddle.full([1], self.model.config.pad_token_id, dtype="int64")
        real = paddle.not_equal(input_ids, pad).cast("int64")
        return real.cumsum(1) * real + pad

    def _classify(self, encoder: nn.Layer, first: Tensor) -> Tensor:
        """See there."""
        head, scope = self.model.classifier, self.scopes
        with scope("classifier"):
            with scope("dense"):
                h = paddle.tanh(linear(head.dense, first))
            with scope("out_proj"):
                return linear(head.out_proj, h)

    def _predict(self, x: Tensor) -> Tensor:
        """See there."""
        head, scope = self.model.lm_head, self.scopes
        with scope("lm_head"):
            with scope("dense"):
                h = F.gelu(linear(head.dense, x))
            with scope("layer_norm"):
                h = layer_norm(head.layer_norm, h)
            with scope("decoder"):
                return paddle.matmul(h, head.decoder.weight, transpose_y=True) + head.bias
