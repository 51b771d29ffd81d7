"""Qwen (Bai et al. 2023), the first generation: Qwen-1.8B to Qwen-72B."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from peft_deploy.errors import UnsupportedModelError
from peft_deploy.families.entries import head_dim, refuse_other, refuse_set, token_arguments
from peft_deploy.families.family import DecoderFamily, ModelDims
from peft_deploy.families.names import NameMap, NameRule
from peft_deploy.families.packing import PackRule
from peft_deploy.families.registry import register
from peft_deploy.signature import GraphSignature

if TYPE_CHECKING:
    from paddle import Tensor, nn

_LAYER = "h.{i}."
_LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
_NORMS = ("ln_1", "ln_2")
_SHARED_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "kv_channels",
    "seq_length",
    "max_position_embeddings",
    "layer_norm_epsilon",
    "rotary_emb_base",
    "use_dynamic_ntk",
    "use_logn_attn",
    "no_bias",
    "initializer_range",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
# Features that change what the model computes, and that this family's stand-in or PaddleNLP's class leaves out.
_REFUSED = {
    "tie_word_embeddings": "a head that is the embedding table, which PaddleNLP's Qwen does not have",
    "fuse_attention_ffn": "fused w1/w2 weights",
    "use_cache_quantization": "a cache of 8-bit integers",
    "use_long_sequence_strategies": "PaddleNLP's long-sequence strategies",
}
_FIXED = {
    "rotary_pct": (1.0, "PaddleNLP's Qwen rotates whole heads"),
    "scale_attn_weights": (True, "PaddleNLP's Qwen scales the scores"),
}
_LOGN_LENGTH = 32767  # PaddleNLP's table of log-n factors ends there


@register
class Qwen(DecoderFamily):
    """Pre-norm decoder with rotary positions, fused q/k/v with a bias and a SiLU-gated feed-forward block.

    Two features change what a token gives once a text is longer than the length that the model was trained on
    (``seq_length``). Log-n attention (``use_logn_attn``: queries grow with the logarithm of the number of tokens)
    is computed. Dynamic NTK (``use_dynamic_ntk``: other rotations for longer prompts) depends on what earlier calls
    have seen, which a graph cannot; so with it the position table ends at ``seq_length``, up to where it changes
    nothing.
    """

    model_type = "qwen"
    architectures = {"QWenForCausalLM": "QWenForCausalLM", "QWenLMHeadModel": "QWenForCausalLM"}
    past_layout = "BSKD"
    lora_targets = tuple(rf".*{name.replace('.', '[.]')}" for name in _LINEARS)
    paddle_config = "QWenConfig"
    inert = frozenset({"bf16", "fp16", "fp32", "softmax_in_fp32", "use_cache_kernel"})

    def names(self, config: Mapping[str, Any]) -> NameMap:
        """See :meth:`Family.names`."""
        return NameMap(
            _name_rules(biased=not config.get("no_bias", True)),
            ignored=[r"transformer\.(h\.\d+\.attn\.)?rotary_emb\.inv_freq"],
        )

    def pack_rules(self, config: Mapping[str, Any]) -> tuple[PackRule, ...]:
        """See :meth:`Family.pack_rules`; w2 is the gate."""
        return (PackRule(f"qwen.{_LAYER}mlp", ("w2", "w1"), "w2_w1"),)

    def paddle_arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See :meth:`Family.paddle_arguments`."""
        refuse_set(config, _REFUSED)
        refuse_other(config, _FIXED)
        derived = head_dim(config["hidden_size"], config["num_attention_heads"])
        if config.get("kv_channels", 128) != derived:
            raise UnsupportedModelError(
                f"config.json sets kv_channels to {config.get('kv_channels', 128)}; PaddleNLP's Qwen computes with "
                f"hidden_size / num_attention_heads = {derived}"
            )
        arguments = {key: config[key] for key in _SHARED_KEYS if config.get(key) is not None}
        arguments["seq_length"] = config["seq_length"]  # has no default
        return arguments | token_arguments(config)

    def dims(self, config: Mapping[str, Any]) -> ModelDims:
        """See :meth:`Family.dims`."""
        heads = config["num_attention_heads"]
        positions = config.get("max_position_embeddings", 8192)
        if config.get("use_dynamic_ntk", True):
            positions = min(positions, config["seq_length"])
        if config.get("use_logn_attn", True):
            positions = min(positions, _LOGN_LENGTH)
        return ModelDims(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim(config["hidden_size"], heads),
            vocab_size=config["vocab_size"],
            max_positions=positions,
        )

    def huggingface_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config.json as Qwen's own repository on the hub has it; transformers reads it with remote code only."""
        shared = {key: config[key] for key in _SHARED_KEYS if key in config}
        return {
            "model_type": self.model_type,
            "architectures": ["QWenLMHeadModel"],
            **shared,
            "rotary_pct": 1.0,
            "scale_attn_weights": True,
            "tie_word_embeddings": False,
            "use_cache": True,
        }

    def stand_in(self, model: nn.Layer) -> nn.Layer:
        """See :meth:`Family.stand_in`."""
        from peft_deploy.families.standins.qwen import QwenStandIn

        return QwenStandIn(model, self.dims(model.config.to_dict()).max_positions)

    def run_eagerly(
        self, model: nn.Layer, feeds: Mapping[str, Tensor], signature: GraphSignature
    ) -> dict[str, Tensor]:
        """See :meth:`Family.run_eagerly`."""
        from peft_deploy.families.eager_repairs import logn_by_tokens

        with logn_by_tokens(model, feeds):
            return super().run_eagerly(model, feeds, signature)


def _name_rules(*, biased: bool) -> Iterator[NameRule]:
    yield NameRule("qwen.wte.weight", "transformer.wte.weight")
    for name in _NORMS:
        yield NameRule(f"qwen.{_LAYER}{name}.weight", f"transformer.{_LAYER}{name}.weight")
    for name in _LINEARS:
        paddle, huggingface = f"qwen.{_LAYER}{name}", f"transformer.{_LAYER}{name}"
        yield NameRule(f"{paddle}.weight", f"{huggingface}.weight", transpose=True)
        if biased or name == "attn.c_attn":
            yield NameRule(f"{paddle}.bias", f"{huggingface}.bias")
    yield NameRule("qwen.ln_f.weight", "transformer.ln_f.weight")
    yield NameRule("lm_head.weight", "lm_head.weight", transpose=True)
