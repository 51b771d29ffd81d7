"""OPT (Zhang et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peft_deploy.errors import UnsupportedModelError
from peft_deploy.families.entries import (
    activation,
    entry,
    head_dim,
    refuse_other,
    refuse_set,
    token_arguments,
)
from peft_deploy.families.family import DecoderFamily, ModelDims
from peft_deploy.families.names import NameMap, NameRule
from peft_deploy.families.packing import PackRule
from peft_deploy.families.parallel import ParallelRule
from peft_deploy.families.registry import register
from peft_deploy.signature import POSITION_IDS, GraphSignature

if TYPE_CHECKING:
    from paddle import Tensor, nn

_LAYER = "decoder.layers.{i}."
_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
_LINEARS = {f"self_attn.{name}": f"self_attn.{name}" for name in _ATTENTION} | {
    "linear1": "fc1",
    "linear2": "fc2",
}
_NORMS = {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm"}
_EMBEDDING = "opt.embeddings.word_embeddings.weight"
_HEAD = "lm_head.decoder_weight"
_ACTIVATIONS = {"relu": "relu", "gelu": "gelu_new", "silu": "silu"}
_FIXED = {
    "enable_bias": (True, "PaddleNLP's OPT has biases in all linear layers"),
    "layer_norm_elementwise_affine": (True, "PaddleNLP's OPT has weights in all norms"),
}
_REFUSED = {"_remove_final_layer_norm": "a pre-norm model without its final norm"}


@register
class OPT(DecoderFamily):
    """Pre- or post-norm decoder with learned positions, which its checkpoints keep two rows further down."""

    model_type = "opt"
    architectures = {
        "OPTForCausalLM": "OPTForCausalLM",
        "OPTForConditionalGeneration": "OPTForCausalLM",
    }
    past_layout = "BKSD"
    past_argument = "cache"
    lora_targets = (r".*(q|k|v|out)_proj", r".*(linear1|linear2|project_in|project_out)")
    parallel_rules = (
        *(
            ParallelRule(f"opt.{_LAYER}self_attn.{n}", "column", "num_heads")
            for n in _ATTENTION[:3]
        ),
        ParallelRule(f"opt.{_LAYER}self_attn.out_proj", "row", "num_heads"),
        ParallelRule(f"opt.{_LAYER}linear1", "column"),
        ParallelRule(f"opt.{_LAYER}linear2", "row"),
        ParallelRule("opt.embeddings.project_in", "column"),
        ParallelRule("opt.decoder.project_out", "column"),
        ParallelRule("opt.embeddings.word_embeddings", "row", "vocab_size"),
    )
    paddle_config = "OPTConfig"
    inert = frozenset({"type_vocab_size"})

    def names(self, config: Mapping[str, Any]) -> NameMap:
        """See :meth:`Family.names`."""
        layers = [
            *(
                NameRule(f"opt.{_LAYER}{own}.{p}", f"model.{_LAYER}{theirs}.{p}", p == "weight")
                for own, theirs in _LINEARS.items()
                for p in ("weight", "bias")
            ),
            *(
                NameRule(f"opt.{_LAYER}{own}.{p}", f"model.{_LAYER}{theirs}.{p}")
                for own, theirs in _NORMS.items()
                for p in ("weight", "bias")
            ),
        ]
        positions = "opt.embeddings.position_embeddings.weight"
        ends = [
            NameRule(_EMBEDDING, "model.decoder.embed_tokens.weight"),
            NameRule(positions, "model.decoder.embed_positions.weight"),
            NameRule(_HEAD, "lm_head.weight"),
        ]
        if _is_pre_norm(config):
            norm = "decoder.final_layer_norm"
            ends += [NameRule(f"opt.{norm}.{p}", f"model.{norm}.{p}") for p in ("weight", "bias")]
        if config.get("word_embed_proj_dim") not in (None, config.get("hidden_size")):
            projections = {
                "embeddings.project_in": "project_in",
                "decoder.project_out": "project_out",
            }
            ends += [
                NameRule(f"opt.{own}.weight", f"model.decoder.{theirs}.weight", transpose=True)
                for own, theirs in projections.items()
            ]
        return NameMap([*ends, *layers])

    def pack_rules(self, config: Mapping[str, Any]) -> tuple[PackRule, ...]:
        """See :meth:`Family.pack_rules`."""
        return (PackRule(f"opt.{_LAYER}self_attn", ("q_proj", "k_proj", "v_proj"), "qkv_proj"),)

    def tied(self, config: Mapping[str, Any]) -> Mapping[str, str]:
        """See :meth:`Family.tied`; PaddleNLP 3's class never ties, whatever the default of its configuration is."""
        default = "paddlenlp_version" not in config
        return {_HEAD: _EMBEDDING} if entry(config, "tie_word_embeddings", default=default) else {}

    def kept_apart(self, config: Mapping[str, Any]) -> Mapping[str, str]:
        """See :meth:`Family.kept_apart`."""
        return self.tied(config)

    def paddle_arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See :meth:`Family.paddle_arguments`."""
        refuse_set(config, _REFUSED)
        refuse_other(config, _FIXED)
        word_size, hidden = _word_size(config), config["hidden_size"]
        if word_size != hidden and not self.tied(config):
            raise UnsupportedModelError(
                f"config.json sets word_embed_proj_dim to {word_size} and hidden_size to {hidden}; "
                "an output layer of its own does not fit the projected states in PaddleNLP's OPT",
                hint="if the output layer is the word embedding, set tie_word_embeddings to true",
            )
        head_dim(hidden, config["num_attention_heads"])
        return {
            "vocab_size": config["vocab_size"],
            "hidden_size": hidden,
            "num_hidden_layers": config["num_hidden_layers"],
            "num_attention_heads": config["num_attention_heads"],
            "intermediate_size": entry(config, "intermediate_size", "ffn_dim"),
            "max_position_embeddings": config["max_position_embeddings"],
            "word_embed_proj_dim": word_size,
            "normalize_before": _is_pre_norm(config),
            "hidden_act": activation(config, "hidden_act", _ACTIVATIONS, "relu"),
            "hidden_dropout_prob": entry(config, "hidden_dropout_prob", "dropout", default=0.1),
            "attention_probs_dropout_prob": entry(
                config, "attention_probs_dropout_prob", "attention_dropout", default=0.0
            ),
            "tie_word_embeddings": bool(self.tied(config)),
            **token_arguments(config),
        }

    def dims(self, config: Mapping[str, Any]) -> ModelDims:
        """See :meth:`Family.dims`."""
        heads = config["num_attention_heads"]
        return ModelDims(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim(config["hidden_size"], heads),
            vocab_size=config["vocab_size"],
            max_positions=config["max_position_embeddings"],
        )

    def huggingface_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See :meth:`Family.huggingface_config`."""
        own = self.paddle_arguments(config)
        function = _ACTIVATIONS[own.pop("hidden_act")]
        names = {
            "intermediate_size": "ffn_dim",
            "normalize_before": "do_layer_norm_before",
            "hidden_dropout_prob": "dropout",
            "attention_probs_dropout_prob": "attention_dropout",
        }
        translated = {names.get(key, key): value for key, value in own.items()}
        return {
            "model_type": self.model_type,
            "architectures": ["OPTForCausalLM"],
            **translated,
            "activation_function": function,
            **{key: config[key] for key in token_arguments(config)},
            "use_cache": True,
        }

    def stand_in(self, model: nn.Layer) -> nn.Layer:
        """See :meth:`Family.stand_in`."""
        from peft_deploy.families.standins.absolute import OPTStandIn

        return OPTStandIn(model)

    def run_eagerly(
        self, model: nn.Layer, feeds: Mapping[str, Tensor], signature: GraphSignature
    ) -> dict[str, Tensor]:
        """See :meth:`Family.run_eagerly`; PaddleNLP's OPT takes no positions, but counts them in the mask."""
        from peft_deploy.families.eager import rows_given, run_decoder

        pair = model.opt.decoder.layers[0].self_attn.Cache
        table = model.opt.embeddings.position_embeddings
        with rows_given(table, feeds[POSITION_IDS] + table.offset):
            return run_decoder(
                model, feeds, signature, self.past_layout, self.past_argument, pair=pair
            )


def _is_pre_norm(config: Mapping[str, Any]) -> bool:
    return bool(entry(config, "normalize_before", "do_layer_norm_before", default=True))


def _word_size(config: Mapping[str, Any]) -> int:
    return int(entry(config, "word_embed_proj_dim", default=config["hidden_size"]))
