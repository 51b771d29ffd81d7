"""ChatGLM2 and ChatGLM3 (Zeng et al. 2023, THUDM/chatglm2-6b): both are PaddleNLP's ``chatglm_v2``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from peft_deploy.errors import UnsupportedModelError
from peft_deploy.families.entries import (
    entry,
    head_dim,
    refuse_other,
    refuse_set,
    token_arguments,
)
from peft_deploy.families.family import DecoderFamily, ModelDims
from peft_deploy.families.names import NameMap, NameRule
from peft_deploy.families.registry import register
from peft_deploy.signature import GraphSignature

if TYPE_CHECKING:
    from paddle import Tensor, nn

_LAYER = "encoder.layers.{i}."
_LINEARS = (
    "self_attention.query_key_value",
    "self_attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
)
_NORMS = ("input_layernorm", "post_attention_layernorm")
# PaddleNLP's name of an entry → Hugging Face's, where they differ; either may stand in a config.json.
_RENAMED = {
    "num_hidden_layers": "num_layers",
    "vocab_size": "padded_vocab_size",
    "max_sequence_length": "seq_length",
}
_SAME_KEYS = (
    "hidden_size",
    "ffn_hidden_size",
    "kv_channels",
    "num_attention_heads",
    "multi_query_group_num",
    "layernorm_epsilon",
    "post_layer_norm",
    "apply_residual_connection_post_layernorm",
    "apply_query_key_layer_scaling",
    "attention_softmax_in_fp32",
    "add_bias_linear",
    "add_qkv_bias",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
_FIXED = {
    "rmsnorm": (True, "PaddleNLP's ChatGLM2 has root-mean-square norms only"),
    "multi_query_attention": (
        True,
        "PaddleNLP's ChatGLM2 has query, key and value one after another",
    ),
    "rope_ratio": (1, "PaddleNLP's ChatGLM2 does not stretch rotations"),
}
_REFUSED = {
    "interleaved_qkv": "query, key and value side by side in every head",
    "use_long_sequence_strategies": "PaddleNLP's long-sequence strategies",
    "pre_seq_len": "P-tuning of the original code, whose weights PaddleNLP does not have,",
}
_FIRST_GENERATION = ("position_encoding_2d", "inner_hidden_size")  # entries that only it has


@register
class ChatGLM2(DecoderFamily):
    """Pre-norm decoder with grouped heads whose first half is rotated, by pairs of neighbours.

    Query, key and value are one fused projection, and so are the two halves of the SiLU-gated feed-forward block,
    in PaddleNLP as in Hugging Face.
    """

    model_type = "chatglm_v2"
    architectures = {
        "ChatGLMv2ForCausalLM": "ChatGLMv2ForCausalLM",
        "ChatGLMForConditionalGeneration": "ChatGLMv2ForCausalLM",
        "ChatGLMModel": "ChatGLMv2ForCausalLM",
    }
    past_layout = "SBKD"
    lora_targets = tuple(rf".*{name.replace('.', '[.]')}" for name in _LINEARS)
    paddle_config = "ChatGLMv2Config"
    inert = frozenset(
        {"fp32_residual_connection", "original_rope", "prefix_projection", "tie_word_embeddings"}
    )

    def names(self, config: Mapping[str, Any]) -> NameMap:
        """See :meth:`Family.names`."""
        # Both layouts keep the frequencies of the rotations, which follow from the sizes.
        return NameMap(
            _name_rules(config), ignored=[r"(transformer|chatglm_v2)\.rotary_pos_emb\.inv_freq"]
        )

    def paddle_arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See :meth:`Family.paddle_arguments`."""
        if any(key in config for key in _FIRST_GENERATION):
            raise UnsupportedModelError(
                "config.json is that of the first ChatGLM; known are ChatGLM2 and ChatGLM3",
                hint="the two generations share the name of their architecture, not the architecture",
            )
        refuse_set(config, _REFUSED)
        refuse_other(config, _FIXED)
        arguments = {key: config[key] for key in _SAME_KEYS if config.get(key) is not None}
        arguments |= {own: _either(config, own) for own in _RENAMED}
        derived = head_dim(config["hidden_size"], config["num_attention_heads"])
        if config.get("kv_channels", 128) != derived:
            raise UnsupportedModelError(
                f"config.json sets kv_channels to {config.get('kv_channels', 128)}; PaddleNLP's ChatGLM2 wants "
                f"hidden_size / num_attention_heads = {derived}"
            )
        return arguments | token_arguments(config)

    def dims(self, config: Mapping[str, Any]) -> ModelDims:
        """See :meth:`Family.dims`."""
        return ModelDims(
            num_layers=_either(config, "num_hidden_layers"),
            hidden_size=config["hidden_size"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config.get("multi_query_group_num", 1),
            head_dim=head_dim(config["hidden_size"], config["num_attention_heads"]),
            vocab_size=_either(config, "vocab_size"),
            max_positions=_either(config, "max_sequence_length"),
        )

    def huggingface_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config.json as ChatGLM's own repository on the hub has it; transformers reads it with remote code only.

        The entries that have other names elsewhere are written under both.
        """
        dims = self.dims(config)
        shared = {key: config[key] for key in _SAME_KEYS if key in config}
        return {
            "model_type": "chatglm",
            "architectures": ["ChatGLMForConditionalGeneration"],
            **shared,
            "kv_channels": dims.head_dim,
            "multi_query_group_num": dims.num_kv_heads,
            **{own: _either(config, own) for own in _RENAMED if own != "max_sequence_length"},
            **{theirs: _either(config, own) for own, theirs in _RENAMED.items()},
            **{key: value for key, (value, _) in _FIXED.items()},
            "original_rope": True,
            "tie_word_embeddings": False,
            "use_cache": True,
        }

    def stand_in(self, model: nn.Layer) -> nn.Layer:
        """See :meth:`Family.stand_in`."""
        from peft_deploy.families.standins.chatglm_v2 import ChatGLM2StandIn

        return ChatGLM2StandIn(model)

    def run_eagerly(
        self, model: nn.Layer, feeds: Mapping[str, Tensor], signature: GraphSignature
    ) -> dict[str, Tensor]:
        """See :meth:`Family.run_eagerly`."""
        from peft_deploy.families.eager_repairs import computing_in_own_dtype

        with computing_in_own_dtype(model):
            return super().run_eagerly(model, feeds, signature)


def _either(config: Mapping[str, Any], key: str) -> Any:
    """An entry under PaddleNLP's name or Hugging Face's."""
    return entry(config, key, _RENAMED[key])


def _name_rules(config: Mapping[str, Any]) -> Iterator[NameRule]:
    everywhere = bool(config.get("add_bias_linear"))
    biased = set(_LINEARS if everywhere else ())
    if config.get("add_qkv_bias"):
        biased.add(_LINEARS[0])

    def rule(name: str, *, transpose: bool = False) -> NameRule:
        return NameRule(f"chatglm_v2.{name}", f"transformer.{name}", transpose)

    yield rule("embedding.word_embeddings.weight")
    for name in _NORMS:
        yield rule(f"{_LAYER}{name}.weight")
    for name in _LINEARS:
        yield rule(f"{_LAYER}{name}.weight", transpose=True)
        if name in biased:
            yield rule(f"{_LAYER}{name}.bias")
    if config.get("post_layer_norm", True):
        yield rule("encoder.final_layernorm.weight")
    yield rule("output_layer.weight", transpose=True)
