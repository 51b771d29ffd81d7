"""BLOOM (Scao et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peft_deploy.families.entries import (
    entry,
    head_dim,
    refuse_other,
    refuse_set,
    token_arguments,
)
from peft_deploy.families.family import DecoderFamily, ModelDims
from peft_deploy.families.names import NameMap, NameRule
from peft_deploy.families.parallel import ParallelRule
from peft_deploy.families.registry import register

if TYPE_CHECKING:
    from paddle import nn

_LAYER = "h.{i}."
_LINEARS = (
    "self_attention.query_key_value",
    "self_attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
)
_NORMS = (f"{_LAYER}input_layernorm", f"{_LAYER}post_attention_layernorm")
_EMBEDDING = "word_embeddings.weight"
_HEAD = "lm_head.decoder_weight"
_SIZES = {  # PaddleNLP's key → other spellings
    "hidden_size": ("n_embed",),
    "n_layer": ("num_hidden_layers",),
    "n_head": ("num_attention_heads",),
}
_DEFAULTS = {
    "layer_norm_epsilon": 1e-5,
    "apply_residual_connection_post_layernorm": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
_TRAINED_LENGTH = 2048  # of all released models; nothing in the model ends there
_REFUSED = {
    "use_long_sequence_strategies": "PaddleNLP's long-sequence strategies",
}
_FIXED = {"tie_word_embeddings": (True, "PaddleNLP's Bloom has no output layer of its own")}


@register
class Bloom(DecoderFamily):
    """Pre-norm decoder that knows positions by ALiBi alone, so its graph takes no position_ids."""

    model_type = "bloom"
    architectures = {"BloomForCausalLM": "BloomForCausalLM"}
    past_layout = "BSKD"
    past_argument = "cache"
    lora_targets = tuple(rf".*{name.split('.')[1]}" for name in _LINEARS)
    parallel_rules = (
        ParallelRule(f"bloom.{_LAYER}self_attention.query_key_value", "column", "num_heads"),
        ParallelRule(f"bloom.{_LAYER}self_attention.dense", "row", "num_heads"),
        ParallelRule(f"bloom.{_LAYER}mlp.dense_h_to_4h", "column"),
        ParallelRule(f"bloom.{_LAYER}mlp.dense_4h_to_h", "row"),
        ParallelRule("bloom.word_embeddings", "row", "vocab_size"),
    )
    paddle_config = "BloomConfig"
    inert = frozenset(
        {
            "attention_softmax_in_fp32",
            "masked_softmax_fusion",
            "offset_alibi",
            "skip_bias_add",
            "skip_bias_add_qkv",
            "slow_but_exact",
        }
    )
    _names = NameMap(
        [
            NameRule(f"bloom.{_EMBEDDING}", f"transformer.{_EMBEDDING}"),
            NameRule(_HEAD, "lm_head.weight"),
            *(
                NameRule(f"bloom.{norm}.{kind}", f"transformer.{norm}.{kind}")
                for norm in ("word_embeddings_layernorm", *_NORMS, "ln_f")
                for kind in ("weight", "bias")
            ),
            *(
                NameRule(
                    f"bloom.{_LAYER}{linear}.{kind}",
                    f"transformer.{_LAYER}{linear}.{kind}",
                    transpose=kind == "weight",
                )
                for linear in _LINEARS
                for kind in ("weight", "bias")
            ),
        ]
    )

    def takes_positions(self, config: Mapping[str, Any]) -> bool:
        """See :meth:`DecoderFamily.takes_positions`."""
        return False

    def names(self, config: Mapping[str, Any]) -> NameMap:
        """See :meth:`Family.names`."""
        return self._names

    def tied(self, config: Mapping[str, Any]) -> Mapping[str, str]:
        """See :meth:`Family.tied`."""
        return {_HEAD: f"bloom.{_EMBEDDING}"}

    def paddle_arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See :meth:`Family.paddle_arguments`."""
        refuse_set(config, _REFUSED)
        refuse_other(config, _FIXED)
        if config.get("pretraining_tp", 1) != 1:
            feature = "a sum over tensor-parallel slices, which leaves out biases,"
            refuse_set(config, {"slow_but_exact": feature})
        sizes = {own: entry(config, own, *others) for own, others in _SIZES.items()}
        hidden = sizes["hidden_size"]
        inner = (
            4 * hidden,
            "PaddleNLP's Bloom has a feed-forward block four times the hidden size",
        )
        refuse_other(config, {"n_inner": inner})
        head_dim(hidden, sizes["n_head"])
        return {
            "vocab_size": config["vocab_size"],
            **sizes,
            **{key: entry(config, key, default=value) for key, value in _DEFAULTS.items()},
            **token_arguments(config),
        }

    def dims(self, config: Mapping[str, Any]) -> ModelDims:
        """See :meth:`Family.dims`; the positions are those that the model was trained with."""
        sizes = {own: entry(config, own, *others) for own, others in _SIZES.items()}
        return ModelDims(
            num_layers=sizes["n_layer"],
            hidden_size=sizes["hidden_size"],
            num_heads=sizes["n_head"],
            num_kv_heads=sizes["n_head"],
            head_dim=head_dim(sizes["hidden_size"], sizes["n_head"]),
            vocab_size=config["vocab_size"],
            max_positions=entry(config, "seq_length", default=_TRAINED_LENGTH),
        )

    def huggingface_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See :meth:`Family.huggingface_config`."""
        own = self.paddle_arguments(config)
        return {
            "model_type": self.model_type,
            "architectures": list(self.architectures)[:1],
            **own,
            **{key: config[key] for key in token_arguments(config)},
            "seq_length": self.dims(config).max_positions,
            "tie_word_embeddings": True,
            "use_cache": True,
        }

    def stand_in(self, model: nn.Layer) -> nn.Layer:
        """See :meth:`Family.stand_in`."""
        from peft_deploy.families.standins.bloom import BloomStandIn

        return BloomStandIn(model)
