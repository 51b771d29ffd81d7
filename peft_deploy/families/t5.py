"""T5 (Raffel et al. 2020), and T5 v1.1 with its gated feed-forward blocks (Shazeer 2020)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peft_deploy.errors import UnsupportedModelError
from peft_deploy.families.encoder_decoder import EncoderDecoderFamily
from peft_deploy.families.entries import entry, refuse_other, token_arguments
from peft_deploy.families.family import ModelDims
from peft_deploy.families.packing import PackRule
from peft_deploy.families.registry import register
from peft_deploy.families.t5_names import CROSS, DECODER, ENCODER, HEAD, SHARED, T5Names
from peft_deploy.signature import GraphSignature

if TYPE_CHECKING:
    from paddle import Tensor, nn

_FEED_FORWARD = ("relu", "gated-gelu", "gated-silu")
MAX_DISTANCE = 128  # beyond it all distances share a bucket; PaddleNLP has it in its code
_BUCKETS = range(4, 2 * MAX_DISTANCE)  # fewer leave none for near tokens, more none for far ones
_BUCKETS_DEFAULT = 32
_TRAINED_LENGTH = 512  # of T5's own training; nothing in the model ends there
_FIXED = {
    "relative_attention_max_distance": (
        MAX_DISTANCE,
        "PaddleNLP's T5 does not look at it and counts distances up to its own limit",
    ),
}
_CROSS_PROJECTION = re.compile(rf"{re.escape(DECODER)}block\.\d+\.{re.escape(CROSS)}[kv]\..*")


@register
class T5(EncoderDecoderFamily):
    """Pre-norm encoder and decoder without biases, with positions as a bias of the scores.

    The bias follows the distance between real tokens, so that padding on either side changes nothing.
    """

    model_type = "t5"
    architectures = {"T5ForConditionalGeneration": "T5ForConditionalGeneration"}
    lora_targets = (r".*Attention\.(q|k|v|o)", r".*DenseReluDense\.(wi|wi_0|wi_1|wo)")
    paddle_config = "T5Config"
    inert = frozenset({"dense_act_fn", "is_gated_act"})

    def names(self, config: Mapping[str, Any]) -> T5Names:
        """See :meth:`Family.names`."""
        layers = entry(config, "num_layers", "num_hidden_layers", default=None)
        return T5Names(
            gated=_feed_forward(config).startswith("gated"),
            encoder_layers=layers,
            decoder_layers=entry(config, "num_decoder_layers", default=layers),
        )

    def pack_rules(self, config: Mapping[str, Any]) -> tuple[PackRule, ...]:
        """See :meth:`Family.pack_rules`: cross-attention reads the text, and its keys and values the source."""
        halves = ((ENCODER, "layer.1"), (DECODER, "layer.2"))
        own = (
            PackRule(f"{half}block.{{i}}.layer.0.SelfAttention", ("q", "k", "v"), "qkv")
            for half, _ in halves
        )
        gates = (
            PackRule(f"{half}block.{{i}}.{place}.DenseReluDense", ("wi_0", "wi_1"), "wi")
            for half, place in halves
        )
        cross = PackRule(f"{DECODER}block.{{i}}.layer.1.EncDecAttention", ("k", "v"), "kv")
        return (*own, *gates, cross)

    def tied(self, config: Mapping[str, Any]) -> Mapping[str, str]:
        """See :meth:`Family.tied`; both halves read the same embeddings, and v1.0 writes with them, too."""
        halves = {f"{half}embed_tokens.weight": SHARED for half in (ENCODER, DECODER)}
        return {**halves, **({HEAD: SHARED} if _is_tied(config) else {})}

    def paddle_arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See :meth:`Family.paddle_arguments`."""
        refuse_other(config, _FIXED)
        if (kind := _feed_forward(config)) not in _FEED_FORWARD:
            raise UnsupportedModelError(
                f"config.json sets feed_forward_proj to {kind!r}; exported are {', '.join(_FEED_FORWARD)}"
            )
        if (buckets := _buckets(config)) not in _BUCKETS:
            raise UnsupportedModelError(
                f"config.json sets relative_attention_num_buckets to {buckets!r}; "
                f"distances up to {MAX_DISTANCE} need {_BUCKETS[0]} to {_BUCKETS[-1]} of them"
            )
        return {
            "vocab_size": config["vocab_size"],
            "d_model": entry(config, "d_model", "hidden_size"),
            "d_kv": config["d_kv"],
            "d_ff": config["d_ff"],
            "num_layers": entry(config, "num_layers", "num_hidden_layers"),
            "num_decoder_layers": _decoder_layers(config),
            "num_heads": entry(config, "num_heads", "num_attention_heads"),
            "relative_attention_num_buckets": buckets,
            "relative_attention_max_distance": MAX_DISTANCE,
            "dropout_rate": entry(config, "dropout_rate", default=0.1),
            "layer_norm_epsilon": entry(config, "layer_norm_epsilon", default=1e-6),
            "feed_forward_proj": kind,
            "tie_word_embeddings": _is_tied(config),
            **token_arguments(config),
        }

    def dims(self, config: Mapping[str, Any]) -> ModelDims:
        """See :meth:`Family.dims`."""
        heads = entry(config, "num_heads", "num_attention_heads")
        return ModelDims(
            num_layers=_decoder_layers(config),
            hidden_size=entry(config, "d_model", "hidden_size"),
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=config["d_kv"],
            vocab_size=config["vocab_size"],
            max_positions=entry(config, "n_positions", default=_TRAINED_LENGTH),
        )

    def context_length(self, config: Mapping[str, Any]) -> int | None:
        """See :meth:`Family.context_length`; distances have no end."""
        return None

    def huggingface_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See :meth:`Family.huggingface_config`."""
        return {
            "model_type": self.model_type,
            "architectures": ["T5ForConditionalGeneration"],
            **self.paddle_arguments(config),
            "n_positions": self.dims(config).max_positions,
            "is_encoder_decoder": True,
            "decoder_start_token_id": self.start_token(config),
            **{key: config[key] for key in token_arguments(config)},
            "use_cache": True,
        }

    def stand_in(self, model: nn.Layer) -> nn.Layer:
        """See :meth:`Family.stand_in`."""
        from peft_deploy.families.standins.t5 import T5DecoderStandIn

        return T5DecoderStandIn(model, MAX_DISTANCE)

    def encoder_stand_in(self, model: nn.Layer) -> nn.Layer:
        """See :meth:`EncoderDecoderFamily.encoder_stand_in`."""
        from peft_deploy.families.standins.t5 import T5EncoderStandIn

        return T5EncoderStandIn(model, MAX_DISTANCE)

    def encoder_uses(self, parameter: str) -> bool:
        """See :meth:`EncoderDecoderFamily.encoder_uses`."""
        projected = _CROSS_PROJECTION.fullmatch(parameter) is not None
        return parameter == SHARED or parameter.startswith(ENCODER) or projected

    def decoder_uses(self, parameter: str) -> bool:
        """See :meth:`EncoderDecoderFamily.decoder_uses`."""
        return parameter == SHARED or not self.encoder_uses(parameter)

    def start_token(self, config: Mapping[str, Any]) -> int:
        """See :meth:`EncoderDecoderFamily.start_token`: PaddleNLP shifts labels behind the token of the beginning,
        and T5's own models begin with padding.
        """
        keys = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
        found = [config[key] for key in keys if config.get(key) is not None]
        return int(found[0]) if found else 0

    def run_eagerly(
        self, model: nn.Layer, feeds: Mapping[str, Tensor], signature: GraphSignature
    ) -> dict[str, Tensor]:
        """See :meth:`Family.run_eagerly`; a signature without a cache is the encoder's."""
        from peft_deploy.families.eager_encoder_decoder import run_both, run_encoder

        return (run_both if signature.past else run_encoder)(model, feeds, signature)


def _feed_forward(config: Mapping[str, Any]) -> str:
    return str(entry(config, "feed_forward_proj", default="relu"))


def _decoder_layers(config: Mapping[str, Any]) -> int:
    layers: int = entry(
        config,
        "num_decoder_layers",
        default=entry(config, "num_layers", "num_hidden_layers"),
    )
    return layers


def _buckets(config: Mapping[str, Any]) -> int:
    count: int = entry(config, "relative_attention_num_buckets", default=_BUCKETS_DEFAULT)
    return count


def _is_tied(config: Mapping[str, Any]) -> bool:
    return bool(entry(config, "tie_word_embeddings", default=True))
