"""GPT as PaddleNLP has it: GPT-2 (Radford et al. 2019), GPT-3 and CPM checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peft_deploy.families.entries import (
    activation,
    entry,
    head_dim,
    refuse_other,
    refuse_set,
    token_arguments,
)
from peft_deploy.families.family import DecoderFamily, ModelDims
from peft_deploy.families.names import FusedRule, NameMap, NameRule
from peft_deploy.families.packing import PackRule
from peft_deploy.families.parallel import ParallelRule
from peft_deploy.families.registry import register

if TYPE_CHECKING:
    from paddle import nn

_LAYER = "gpt.decoder.layers.{i}."
_THEIRS = "transformer.h.{i}."
_QKV = tuple(f"{_LAYER}self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj"))
_FUSED = f"{_LAYER}self_attn.qkv_proj"
_NORMS = {"norm1": "ln_1", "norm2": "ln_2"}
_LINEARS = {
    "self_attn.out_proj": "attn.c_proj",
    "linear1": "mlp.c_fc",
    "linear2": "mlp.c_proj",
}
_EMBEDDING = "gpt.embeddings.word_embeddings.weight"
_TABLES = (r"gpt\.bias", r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias")  # of the causal mask
_EPSILON = 1e-5
_KEYS = {  # PaddleNLP's key → Hugging Face's
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
_EPSILON_REASON = "PaddleNLP's GPT computes all norms with 1e-5"
_FIXED = {
    "layer_norm_eps": (_EPSILON, _EPSILON_REASON),
    "layer_norm_epsilon": (_EPSILON, _EPSILON_REASON),
    "hidden_act": ("gelu", "PaddleNLP's GPT reads hidden_activation in its place"),
    "scale_attn_weights": (True, "PaddleNLP's GPT always scales the scores"),
    "tie_word_embeddings": (True, "PaddleNLP's GPT has no output layer of its own"),
}
_REFUSED = {
    "scale_attn_by_inverse_layer_idx": "a scale of its own in every layer",
    "add_cross_attention": "cross-attention",
}


@register
class GPT(DecoderFamily):
    """Pre- or post-norm decoder with learned positions and a tied output layer."""

    model_type = "gpt"
    architectures = {
        "GPTForCausalLM": "GPTForCausalLM",
        "GPTLMHeadModel": "GPTForCausalLM",
        "GPT2LMHeadModel": "GPTForCausalLM",
    }
    past_layout = "BSKD"
    lora_targets = (r".*(q|k|v|qkv|out)_proj", r".*linear[12]")
    parallel_rules = (
        *(ParallelRule(module, "column", "num_heads") for module in (*_QKV, _FUSED)),
        ParallelRule(f"{_LAYER}self_attn.out_proj", "row", "num_heads"),
        ParallelRule(f"{_LAYER}linear1", "column"),
        ParallelRule(f"{_LAYER}linear2", "row"),
        ParallelRule("gpt.embeddings.word_embeddings", "row", "vocab_size"),
    )
    paddle_config = "GPTConfig"
    inert = frozenset(
        {
            "fused_softmax_with_triangular",
            "n_ctx",
            "reorder_and_upcast_attn",
            "seq_length",
            "type_vocab_size",
            "use_dualpipev",
        }
    )

    def names(self, config: Mapping[str, Any]) -> NameMap:
        """See :meth:`Family.names`.

        Hugging Face's GPT-2 keeps its linear weights [in, out], as PaddleNLP does.
        """
        kinds = ("weight", "bias")
        projections = (_FUSED,) if config.get("fuse_attention_qkv") else _QKV
        rules = [
            NameRule(_EMBEDDING, "transformer.wte.weight"),
            NameRule("gpt.embeddings.position_embeddings.weight", "transformer.wpe.weight"),
            NameRule("lm_head.weight", "lm_head.weight"),
            *(NameRule(f"gpt.decoder.norm.{kind}", f"transformer.ln_f.{kind}") for kind in kinds),
            *(
                NameRule(f"{_LAYER}{own}.{kind}", f"{_THEIRS}{theirs}.{kind}")
                for own, theirs in _NORMS.items()
                for kind in kinds
            ),
            *(
                NameRule(f"{_LAYER}{own}.{kind}", f"{_THEIRS}{theirs}.{kind}", conv1d=True)
                for own, theirs in _LINEARS.items()
                for kind in kinds
            ),
            *(
                NameRule(
                    f"{n}.{kind}",
                    f"{_THEIRS}attn.{n.rpartition('.')[2]}.{kind}",
                    paddle_only=True,
                    conv1d=True,
                )
                for n in projections
                for kind in kinds
            ),
        ]
        fused = [
            FusedRule(tuple(f"{n}.{kind}" for n in _QKV), f"{_THEIRS}attn.c_attn.{kind}")
            for kind in kinds
        ]
        return NameMap(rules, _TABLES, [] if config.get("fuse_attention_qkv") else fused)

    def pack_rules(self, config: Mapping[str, Any]) -> tuple[PackRule, ...]:
        """See :meth:`Family.pack_rules`."""
        return (PackRule(f"{_LAYER}self_attn", ("q_proj", "k_proj", "v_proj"), "qkv_proj"),)

    def tied(self, config: Mapping[str, Any]) -> Mapping[str, str]:
        """See :meth:`Family.tied`."""
        return {"lm_head.weight": _EMBEDDING}

    def paddle_arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See :meth:`Family.paddle_arguments`."""
        refuse_set(config, _REFUSED)
        refuse_other(config, _FIXED)
        sizes = {own: entry(config, own, theirs) for own, theirs in _KEYS.items()}
        hidden = sizes["hidden_size"]
        head_dim(hidden, sizes["num_attention_heads"])
        return {
            "vocab_size": config["vocab_size"],
            **sizes,
            "intermediate_size": entry(config, "intermediate_size", "n_inner", default=4 * hidden),
            # Any other function than gelu fails in PaddleNLP's forward.
            "hidden_activation": activation(
                config, "hidden_activation", {"gelu": "gelu_new"}, "gelu"
            ),
            "normalize_before": bool(entry(config, "normalize_before", default=True)),
            "scale_qk_coeff": float(entry(config, "scale_qk_coeff", default=1.0)),
            "fuse_attention_qkv": bool(config.get("fuse_attention_qkv")),
            "hidden_dropout_prob": entry(config, "hidden_dropout_prob", "embd_pdrop", default=0.1),
            "attention_probs_dropout_prob": entry(
                config, "attention_probs_dropout_prob", "attn_pdrop", default=0.1
            ),
            **token_arguments(config),
        }

    def dims(self, config: Mapping[str, Any]) -> ModelDims:
        """See :meth:`Family.dims`."""
        sizes = {own: entry(config, own, theirs) for own, theirs in _KEYS.items()}
        hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
        return ModelDims(
            num_layers=sizes["num_hidden_layers"],
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim(hidden, heads),
            vocab_size=config["vocab_size"],
            max_positions=sizes["max_position_embeddings"],
        )

    def huggingface_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See :meth:`Family.huggingface_config`."""
        own = self.paddle_arguments(config)
        return {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "vocab_size": own["vocab_size"],
            **{theirs: own[key] for key, theirs in _KEYS.items()},
            "n_inner": own["intermediate_size"],
            "activation_function": "gelu_new",
            "layer_norm_epsilon": _EPSILON,
            "embd_pdrop": own["hidden_dropout_prob"],
            "resid_pdrop": own["hidden_dropout_prob"],
            "attn_pdrop": own["attention_probs_dropout_prob"],
            "tie_word_embeddings": True,
            **{key: config[key] for key in token_arguments(config)},
            "use_cache": True,
        }

    def stand_in(self, model: nn.Layer) -> nn.Layer:
        """See :meth:`Family.stand_in`."""
        from peft_deploy.families.standins.absolute import GPTStandIn

        return GPTStandIn(model)
