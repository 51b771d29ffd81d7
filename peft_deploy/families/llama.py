"""Llama (Touvron et al. 2023): Llama 1 to 3, SmolLM, TinyLlama, Yi and others of that type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peft_deploy.errors import UnsupportedModelError
from peft_deploy.families.family import DecoderFamily, ModelDims
from peft_deploy.families.names import NameMap, NameRule
from peft_deploy.families.parallel import ParallelRule
from peft_deploy.families.registry import register

if TYPE_CHECKING:
    from paddle import nn

_LAYER = "layers.{i}."
_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_NORMS = ("input_layernorm", "post_attention_layernorm")

# Both kinds of config.json share these; what PaddleNLP's class knows by another default is passed explicitly.
_SHARED_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_theta",
    "initializer_range",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
)
# Features that change what the model computes, and that this family's stand-in or PaddleNLP's class leaves out.
_REFUSED = {
    "attention_bias": "biases in the attention projections, which PaddleNLP's Llama does not have",
    "mlp_bias": "biases in the feed-forward block, which PaddleNLP's Llama does not have",
    "alibi": "ALiBi in place of rotary positions",
    "fuse_attention_qkv": "fused q/k/v weights",
    "fuse_attention_ffn": "fused gate/up weights",
    "use_long_sequence_strategies": "PaddleNLP's long-sequence strategies",
}
_ROPE_PARAMETERS = "rope_parameters"  # where transformers 5 keeps theta and scaling together


@register
class Llama(DecoderFamily):
    """Pre-norm decoder with rotary positions, grouped heads and a SiLU-gated feed-forward block."""

    model_type = "llama"
    architectures = {"LlamaForCausalLM": "LlamaForCausalLM"}
    past_layout = "BSKD"
    genai_type = "llama"
    lora_targets = tuple(rf".*{name.split('.')[1]}" for name in _LINEARS)
    parallel_rules = (
        ParallelRule(f"llama.{_LAYER}self_attn.q_proj", "column", "num_heads"),
        ParallelRule(f"llama.{_LAYER}self_attn.k_proj", "column", "num_kv_heads", or_whole=True),
        ParallelRule(f"llama.{_LAYER}self_attn.v_proj", "column", "num_kv_heads", or_whole=True),
        ParallelRule(f"llama.{_LAYER}self_attn.o_proj", "row", "num_heads"),
        ParallelRule(f"llama.{_LAYER}mlp.gate_proj", "column"),
        ParallelRule(f"llama.{_LAYER}mlp.up_proj", "column"),
        ParallelRule(f"llama.{_LAYER}mlp.down_proj", "row"),
        ParallelRule("llama.embed_tokens", "row", "vocab_size", or_whole=True),
        ParallelRule("lm_head", "column", "vocab_size", or_whole=True),
    )
    paddle_config = "LlamaConfig"
    _names = NameMap(
        [
            NameRule("llama.embed_tokens.weight", "model.embed_tokens.weight"),
            *(
                NameRule(f"llama.{_LAYER}{n}.weight", f"model.{_LAYER}{n}.weight", transpose=True)
                for n in _LINEARS
            ),
            *(NameRule(f"llama.{_LAYER}{n}.weight", f"model.{_LAYER}{n}.weight") for n in _NORMS),
            NameRule("llama.norm.weight", "model.norm.weight"),
            NameRule("lm_head.weight", "lm_head.weight", transpose=True),
        ],
        ignored=[r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"],
    )

    def names(self, config: Mapping[str, Any]) -> NameMap:
        """See :meth:`Family.names`."""
        return self._names

    def tied(self, config: Mapping[str, Any]) -> Mapping[str, str]:
        """See :meth:`Family.tied`."""
        if not config.get("tie_word_embeddings"):
            return {}
        return {"lm_head.weight": "llama.embed_tokens.weight"}

    def paddle_arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See :meth:`Family.paddle_arguments`."""
        config = _with_rope(config)
        for key, feature in _REFUSED.items():
            if config.get(key):
                raise UnsupportedModelError(
                    f"config.json sets {key}: {feature} cannot be exported"
                )
        act = config.get("hidden_act", "silu")
        if act not in ("silu", "swish"):
            raise UnsupportedModelError(
                f"config.json sets hidden_act to {act!r}; PaddleNLP's Llama computes silu whatever it says"
            )
        derived = config["hidden_size"] // config["num_attention_heads"]
        if config.get("head_dim") not in (None, derived):
            raise UnsupportedModelError(
                f"config.json sets head_dim to {config['head_dim']}; PaddleNLP's Llama computes with "
                f"hidden_size / num_attention_heads = {derived}"
            )
        arguments = {key: config[key] for key in _SHARED_KEYS if config.get(key) is not None}
        if isinstance(
            arguments.get("eos_token_id"), list
        ):  # several end tokens: PaddleNLP takes one
            arguments["eos_token_id"] = arguments["eos_token_id"][0]
        return arguments | _rope_arguments(config)

    def dims(self, config: Mapping[str, Any]) -> ModelDims:
        """See :meth:`Family.dims`."""
        config = _with_rope(config)
        heads = config["num_attention_heads"]
        scaling = _rope_arguments(config)
        stretch = scaling.get("rope_scaling_factor", 1.0)
        return ModelDims(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config["hidden_size"] // heads,
            vocab_size=config["vocab_size"],
            max_positions=int(config.get("max_position_embeddings", 2048) * stretch),
        )

    def huggingface_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See :meth:`Family.huggingface_config`."""
        config = _with_rope(config)
        dims = self.dims(config)
        shared = {key: config[key] for key in _SHARED_KEYS if key in config}
        rope = _rope_arguments(config)
        scaling = rope.get("rope_scaling")
        if kind := rope.get("rope_scaling_type"):
            scaling = {"rope_type": kind, "factor": rope["rope_scaling_factor"]}
        return {
            "model_type": self.model_type,
            "architectures": list(self.architectures)[:1],
            **shared,
            "num_key_value_heads": dims.num_kv_heads,
            "head_dim": dims.head_dim,
            "hidden_act": "silu",
            "rope_scaling": scaling,
            "use_cache": True,
        }

    def stand_in(self, model: nn.Layer) -> nn.Layer:
        """See :meth:`Family.stand_in`."""
        from peft_deploy.families.standins.llama import LlamaStandIn

        return LlamaStandIn(model)


def _with_rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration with ``rope_parameters`` of transformers 5 spelled as its earlier releases did.

    Raises:
        UnsupportedModelError: only a part of each head is rotated, or the entry is no object.
    """
    rope = config.get(_ROPE_PARAMETERS) or {}
    if not isinstance(rope, Mapping):
        raise UnsupportedModelError(
            f"config.json sets {_ROPE_PARAMETERS} to {rope!r}; it must be an object"
        )
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise UnsupportedModelError(
            f"config.json sets partial_rotary_factor to {partial}; PaddleNLP's Llama rotates whole heads"
        )
    if not rope:
        return config
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    theta = {"rope_theta": rope["rope_theta"]} if rope.get("rope_theta") is not None else {}
    return {**config, **theta, "rope_scaling": scaling or config.get("rope_scaling")}


def _rope_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rope scaling in PaddleNLP's words, which knows Hugging Face's ``rope_scaling`` only for Llama 3.

    Raises:
        UnsupportedModelError: for a kind that PaddleNLP would silently ignore, or that depends on the
            sequence length and so is no fixed table.
    """
    kind, factor = config.get("rope_scaling_type"), config.get("rope_scaling_factor", 1.0)
    scaling = config.get("rope_scaling")
    if scaling:
        kind = scaling.get("rope_type", scaling.get("type"))
        factor = scaling.get("factor", 1.0)
        if kind == "llama3":
            return {"rope_scaling": {**scaling, "rope_type": "llama3"}}
    if kind in (None, "default"):
        return {}
    if kind not in ("linear", "ntk"):
        raise UnsupportedModelError(
            f"config.json asks for rope scaling {kind!r}; "
            "exported are: none, linear, ntk (PaddleNLP's), llama3",
            hint="a scaling that depends on the sequence length is no fixed table",
        )
    return {"rope_scaling_type": kind, "rope_scaling_factor": float(factor)}
