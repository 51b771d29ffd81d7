"""Falcon (Almazrouei et al. 2023), in PaddleNLP RW for RefinedWeb: falcon-7b, falcon-rw-1b and their like."""

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

_LAYER = "transformer.h.{i}."
_FUSED = "self_attention.query_key_value"
_LINEARS = (_FUSED, "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_SAME_KEYS = (
    "vocab_size",
    "hidden_size",
    "layer_norm_epsilon",
    "initializer_range",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
_FLAGS = ("multi_query", "parallel_attn", "bias", "alibi")
# transformers' own class has other defaults than the first code on the hub, which PaddleNLP follows.
_TRANSFORMERS_CLASS, _TRANSFORMERS_TYPE = "FalconForCausalLM", "falcon"
_DEFAULTS = {"multi_query": True, "parallel_attn": True}
_POSITIONS = 2048  # that all these models were trained on; their configurations need not say it
_REFUSED = {
    "new_decoder_architecture": "Falcon-40B's q/k/v, kv head by kv head, and its two norms a layer, which PaddleNLP's "
    "RW does not have,",
    "apply_residual_connection_post_layernorm": "the norm's output as the residual, which PaddleNLP's RW ignores,",
    "rope_scaling": "scaled rotations, which PaddleNLP's RW does not compute,",
}
_FIXED = {
    "num_ln_in_parallel_attn": (1, "PaddleNLP's RW has one norm for attention and feed-forward"),
    "activation": ("gelu", "PaddleNLP's RW computes the erf form of GELU"),
    "hidden_act": ("gelu", "PaddleNLP's RW computes the erf form of GELU"),
    "rope_theta": (10000, "PaddleNLP's RW knows one base of rotations"),
}


@register
class Falcon(DecoderFamily):
    """Decoder with rotary positions or ALiBi, one kv head or one a head, blocks in parallel or in sequence.

    PaddleNLP keeps the cache flat, [B * K, S, D], and rotates every call's tokens from position 0; the reference is
    told where they stand. An ALiBi model has no ``position_ids``: they follow from the mask.
    """

    model_type = "RefinedWeb"
    architectures = {"RWForCausalLM": "RWForCausalLM", _TRANSFORMERS_CLASS: "RWForCausalLM"}
    past_layout = "BKSD"  # once the first two axes are told apart
    lora_targets = tuple(rf".*{name.replace('.', '[.]')}" for name in _LINEARS)
    paddle_config = "RWConfig"
    inert = frozenset({"num_kv_heads"})

    def names(self, config: Mapping[str, Any]) -> NameMap:
        """See :meth:`Family.names`."""
        fused = f"{_LAYER}{_FUSED}.weight".replace("{i}", "0")
        return NameMap(
            _name_rules(biased=_flag(config, "bias"), norms=_norms(config)),
            ignored=[r"transformer\.h\.\d+\.self_attention\.maybe_rotary\.inv_freq"],
            rows={fused: config["hidden_size"]} if "hidden_size" in config else {},
        )

    def tied(self, config: Mapping[str, Any]) -> Mapping[str, str]:
        """See :meth:`Family.tied`."""
        if not config.get("tie_word_embeddings", _is_transformers(config)):
            return {}
        return {"lm_head.weight": "transformer.word_embeddings.weight"}

    def paddle_arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See :meth:`Family.paddle_arguments`."""
        _refuse(config)
        H = _heads(config)
        D = head_dim(config["hidden_size"], H)
        if not _flag(config, "alibi") and D % 2:
            raise UnsupportedModelError(
                f"config.json gives heads of {D} dimensions, which PaddleNLP's RW cannot rotate by pairs"
            )
        if _flag(config, "alibi") and H & (H - 1):
            raise UnsupportedModelError(
                f"config.json sets alibi with {H} heads; PaddleNLP's RW fails unless they are a power of two"
            )
        arguments = {key: config[key] for key in _SAME_KEYS if config.get(key) is not None}
        arguments |= token_arguments(config)
        arguments |= {key: _flag(config, key) for key in _FLAGS}
        # PaddleNLP has no such entry; the stand-in needs it for its table.
        arguments["max_position_embeddings"] = _positions(config)
        return arguments | {"n_layer": _layers(config), "n_head": H}

    def remarks(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """See :meth:`Family.remarks`."""
        if not _flag(config, "alibi"):
            return ()
        return (
            "ALiBi: PaddleNLP rounds the slopes to bfloat16, transformers also what they give for each place",
        )

    def dims(self, config: Mapping[str, Any]) -> ModelDims:
        """See :meth:`Family.dims`."""
        heads = _heads(config)
        return ModelDims(
            num_layers=_layers(config),
            hidden_size=config["hidden_size"],
            num_heads=heads,
            num_kv_heads=1 if _flag(config, "multi_query") else heads,
            head_dim=head_dim(config["hidden_size"], heads),
            vocab_size=config["vocab_size"],
            max_positions=_positions(config),
        )

    def huggingface_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See :meth:`Family.huggingface_config`."""
        dims = self.dims(config)
        return {
            "model_type": _TRANSFORMERS_TYPE,
            "architectures": [_TRANSFORMERS_CLASS],
            **{key: config[key] for key in _SAME_KEYS if key in config},
            **{key: _flag(config, key) for key in _FLAGS},
            "num_hidden_layers": dims.num_layers,
            "num_attention_heads": dims.num_heads,
            "num_kv_heads": dims.num_kv_heads,
            "ffn_hidden_size": 4 * dims.hidden_size,
            "new_decoder_architecture": False,
            "activation": "gelu",
            "rope_theta": 10000.0,
            "max_position_embeddings": dims.max_positions,
            "tie_word_embeddings": bool(self.tied(config)),
            "use_cache": True,
        }

    def stand_in(self, model: nn.Layer) -> nn.Layer:
        """See :meth:`Family.stand_in`."""
        from peft_deploy.families.standins.rw import FalconAlibiStandIn, FalconStandIn

        return (FalconAlibiStandIn if model.config.alibi else FalconStandIn)(model)

    def run_eagerly(
        self, model: nn.Layer, feeds: Mapping[str, Tensor], signature: GraphSignature
    ) -> dict[str, Tensor]:
        """See :meth:`Family.run_eagerly`."""
        from peft_deploy.families.eager_repairs import run_with_flat_cache

        return run_with_flat_cache(model, feeds, signature)

    def takes_positions(self, config: Mapping[str, Any]) -> bool:
        """See :meth:`DecoderFamily.takes_positions`."""
        return not _flag(config, "alibi")


def _is_transformers(config: Mapping[str, Any]) -> bool:
    named = config.get("architectures") or []
    return _TRANSFORMERS_CLASS in named or config.get("model_type") == _TRANSFORMERS_TYPE


def _flag(config: Mapping[str, Any], key: str) -> bool:
    default = _is_transformers(config) and _DEFAULTS.get(key, False)
    return bool(config.get(key, default))


def _heads(config: Mapping[str, Any]) -> int:
    return int(entry(config, "n_head", "num_attention_heads"))


def _layers(config: Mapping[str, Any]) -> int:
    return int(entry(config, "n_layer", "num_hidden_layers"))


def _positions(config: Mapping[str, Any]) -> int:
    return int(config.get("max_position_embeddings") or _POSITIONS)


def _norms(config: Mapping[str, Any]) -> tuple[str, ...]:
    parallel = _flag(config, "parallel_attn")
    return ("input_layernorm",) if parallel else ("input_layernorm", "post_attention_layernorm")


def _refuse(config: Mapping[str, Any]) -> None:
    """Fails for what PaddleNLP's class would ignore.

    Raises:
        UnsupportedModelError: it names the entry.
    """
    refuse_set(config, _REFUSED)
    refuse_other(config, _FIXED)
    rope = config.get("rope_parameters") or {}  # where transformers 5 keeps theta and scaling
    if rope.get("rope_theta", 10000) != 10000 or rope.get("rope_type", "default") != "default":
        raise UnsupportedModelError(
            f"config.json sets rope_parameters to {rope!r}: other rotations, which PaddleNLP's RW does not compute"
        )
    width = config.get("ffn_hidden_size") or 4 * config["hidden_size"]
    if width != 4 * config["hidden_size"]:
        raise UnsupportedModelError(
            f"config.json sets ffn_hidden_size to {width}; PaddleNLP's RW computes with "
            f"4 * hidden_size = {4 * config['hidden_size']}"
        )
    kv_heads = config.get("n_head_kv") or config.get("num_kv_heads") or _heads(config)
    if not _flag(config, "multi_query") and kv_heads != _heads(config):
        raise UnsupportedModelError(
            f"config.json sets {kv_heads} kv heads without multi_query: Falcon-40B's grouped heads, "
            "which PaddleNLP's RW does not have"
        )


def _name_rules(*, biased: bool, norms: tuple[str, ...]) -> Iterator[NameRule]:
    """The same names on both sides; only the matrices lie the other way round."""

    def rule(name: str, *, transpose: bool = False) -> NameRule:
        return NameRule(name, name, transpose)

    yield rule("transformer.word_embeddings.weight")
    for name in norms:
        yield rule(f"{_LAYER}{name}.weight")
        yield rule(f"{_LAYER}{name}.bias")
    for name in _LINEARS:
        yield rule(f"{_LAYER}{name}.weight", transpose=True)
        if biased:
            yield rule(f"{_LAYER}{name}.bias")
    yield rule("transformer.ln_f.weight")
    yield rule("transformer.ln_f.bias")
    yield rule("lm_head.weight")
