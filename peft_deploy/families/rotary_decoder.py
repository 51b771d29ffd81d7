"""What Llama and the families built like it have in common: rotary positions, grouped heads, a gated block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from peft_deploy.errors import UnsupportedModelError
from peft_deploy.families.entries import Entries, refuse_set
from peft_deploy.families.family import DecoderFamily, ModelDims
from peft_deploy.families.names import NameMap, NameRule
from peft_deploy.families.packing import PackRule
from peft_deploy.families.parallel import ParallelRule
from peft_deploy.families.rope import huggingface_rope, plain_rope, refuse_scaling, stretched

if TYPE_CHECKING:
    from paddle import nn

LAYER = "layers.{i}."
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_OTHERS = ("self_attn.o_proj", "mlp.down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")
FUSED_QKV = "self_attn.qkv_proj"
FUSED_GATE_UP = "mlp.gate_up_fused_proj"

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
_DEFAULTS = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False}


def rotary_parallel_rules(body: str) -> tuple[ParallelRule, ...]:
    """How PaddleNLP spreads the layers of such a model over tensor-parallel ranks.

    Args:
        body: the bare model's name within the one with a head.
    """
    attention, mlp = f"{body}.{LAYER}self_attn", f"{body}.{LAYER}mlp"
    return (
        ParallelRule(f"{attention}.q_proj", "column", "num_heads"),
        ParallelRule(f"{attention}.k_proj", "column", "num_kv_heads", or_whole=True),
        ParallelRule(f"{attention}.v_proj", "column", "num_kv_heads", or_whole=True),
        ParallelRule(f"{attention}.o_proj", "row", "num_heads"),
        ParallelRule(f"{mlp}.gate_proj", "column"),
        ParallelRule(f"{mlp}.up_proj", "column"),
        ParallelRule(f"{mlp}.down_proj", "row"),
        ParallelRule(f"{body}.embed_tokens", "row", "vocab_size", or_whole=True),
        ParallelRule("lm_head", "column", "vocab_size", or_whole=True),
    )


class RotaryDecoder(DecoderFamily):
    """Pre-norm decoder with rotary positions, grouped heads and a gated feed-forward block.

    Attributes:
        body: the bare model's name within PaddleNLP's model with a head.
        reference: what computes it, for messages.
        defaults: entries of config.json that both libraries take for granted.
        qkv_bias: whether the projections of queries, keys and values have biases.
        may_fuse: whether PaddleNLP keeps projections in one weight when ``fuse_attention_qkv`` or
            ``fuse_attention_ffn`` is set.
        refused: entry of config.json that changes what is computed, and that PaddleNLP's class or the stand-in
            leaves out → what it stands for.
        activations: the values of ``hidden_act`` that are taken for what is computed.
        activation: its name in Hugging Face's models.
        own_head_dim: whether ``head_dim`` may be another than hidden_size / num_attention_heads.
    """

    body: ClassVar[str]
    reference: ClassVar[str]
    defaults: ClassVar[Mapping[str, Any]] = {}
    qkv_bias: ClassVar[bool] = False
    may_fuse: ClassVar[bool] = False
    refused: ClassVar[Mapping[str, str]] = {}
    activations: ClassVar[tuple[str, ...]] = ("silu", "swish")
    activation: ClassVar[str] = "silu"
    own_head_dim: ClassVar[bool] = False
    past_layout = "BSKD"
    inert = frozenset(
        {"is_llama_config", "max_sequence_length", "rope_scaling_factor", "seq_length"}
    )
    lora_targets = (
        r".*self_attn\.(q|k|v|qkv|o)_proj",
        r".*mlp\.(gate|up|gate_up_fused|down)_proj",
    )

    def entries(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The configuration with what it takes for granted, rotary positions spelled the older way."""
        defaults = {**_DEFAULTS, **self.defaults}
        if "num_key_value_heads" in config:
            # Null there means as many as there are heads; the key that is left out means the default.
            defaults["num_key_value_heads"] = config.get("num_attention_heads")
        return plain_rope(Entries(config, defaults), self.reference)

    def rope_arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Rope scaling in PaddleNLP's words; by default none is computed."""
        refuse_scaling(config, self.reference)
        return {}

    def names(self, config: Mapping[str, Any]) -> NameMap:
        """See :meth:`Family.names`."""
        qkv, gate_up = self._fused(config)
        attention = (FUSED_QKV,) if qkv else _QKV
        linears = (*attention, *((FUSED_GATE_UP,) if gate_up else _GATE_UP), *_OTHERS)
        body = f"{self.body}.{LAYER}"
        biases = attention if self.qkv_bias else ()
        return NameMap(
            [
                NameRule(f"{self.body}.embed_tokens.weight", "model.embed_tokens.weight"),
                *(
                    NameRule(
                        f"{body}{n}.weight",
                        f"model.{LAYER}{n}.weight",
                        transpose=True,
                        paddle_only=n in (FUSED_QKV, FUSED_GATE_UP),
                    )
                    for n in linears
                ),
                *(
                    NameRule(
                        f"{body}{n}.bias", f"model.{LAYER}{n}.bias", paddle_only=n == FUSED_QKV
                    )
                    for n in biases
                ),
                *(NameRule(f"{body}{n}.weight", f"model.{LAYER}{n}.weight") for n in _NORMS),
                NameRule(f"{self.body}.norm.weight", "model.norm.weight"),
                NameRule("lm_head.weight", "lm_head.weight", transpose=True),
            ],
            ignored=[r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"],
        )

    def pack_rules(self, config: Mapping[str, Any]) -> tuple[PackRule, ...]:
        """See :meth:`Family.pack_rules`."""
        parent = f"{self.body}.layers.{{i}}"
        return (
            PackRule(f"{parent}.self_attn", ("q_proj", "k_proj", "v_proj"), "qkv_proj"),
            PackRule(f"{parent}.mlp", ("gate_proj", "up_proj"), "gate_up_proj"),
        )

    def tied(self, config: Mapping[str, Any]) -> Mapping[str, str]:
        """See :meth:`Family.tied`."""
        if not self.entries(config)["tie_word_embeddings"]:
            return {}
        return {"lm_head.weight": f"{self.body}.embed_tokens.weight"}

    def paddle_arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See :meth:`Family.paddle_arguments`."""
        entries = self.entries(config)
        self._refuse(entries)
        dims = self.dims(config)
        arguments = {key: entries[key] for key in _SHARED_KEYS if key in entries}
        arguments["num_key_value_heads"] = dims.num_kv_heads
        if self.own_head_dim:
            arguments["head_dim"] = dims.head_dim
        if isinstance(arguments.get("eos_token_id"), list):  # PaddleNLP takes one end token
            arguments["eos_token_id"] = arguments["eos_token_id"][0]
        qkv, gate_up = self._fused(config)
        fused = {"fuse_attention_qkv": True} if qkv else {}
        fused |= {"fuse_attention_ffn": True} if gate_up else {}
        return arguments | fused | self.rope_arguments(entries)

    def dims(self, config: Mapping[str, Any]) -> ModelDims:
        """See :meth:`Family.dims`."""
        entries = self.entries(config)
        heads = entries["num_attention_heads"]
        head_dim = entries["head_dim"] if self.own_head_dim else entries["hidden_size"] // heads
        limit = entries["max_position_embeddings"]
        return ModelDims(
            num_layers=entries["num_hidden_layers"],
            hidden_size=entries["hidden_size"],
            num_heads=heads,
            num_kv_heads=entries.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            vocab_size=entries["vocab_size"],
            max_positions=stretched(limit, self.rope_arguments(entries)),
        )

    def huggingface_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See :meth:`Family.huggingface_config`."""
        entries = self.entries(config)
        dims = self.dims(config)
        shared = {key: entries[key] for key in _SHARED_KEYS if key in entries}
        rope = huggingface_rope(entries, self.rope_arguments(entries), dims.head_dim)
        return {
            "model_type": self.model_type,
            "architectures": list(self.architectures)[:1],
            **shared,
            **rope,
            "num_key_value_heads": dims.num_kv_heads,
            "head_dim": dims.head_dim,
            "hidden_act": self.activation,
            "use_cache": True,
        }

    def stand_in(self, model: nn.Layer) -> nn.Layer:
        """See :meth:`Family.stand_in`."""
        from peft_deploy.families.standins.rotary_decoder import RotaryDecoderStandIn

        return RotaryDecoderStandIn(model, self.body)

    def _fused(self, config: Mapping[str, Any]) -> tuple[bool, bool]:
        """Whether queries, keys and values are one weight, and whether gate and up are."""
        if not self.may_fuse:
            return False, False
        return bool(config.get("fuse_attention_qkv")), bool(config.get("fuse_attention_ffn"))

    def _refuse(self, entries: Mapping[str, Any]) -> None:
        refuse_set(entries, self.refused)
        act = entries.get("hidden_act", self.activation)
        if act not in self.activations:
            raise UnsupportedModelError(
                f"config.json sets hidden_act to {act!r}; {self.reference} is exported with "
                f"{self.activation} only"
            )
        dims = self.dims(entries)
        derived = dims.hidden_size // dims.num_heads
        if not self.own_head_dim and entries.get("head_dim") not in (None, derived):
            raise UnsupportedModelError(
                f"config.json sets head_dim to {entries['head_dim']}; {self.reference} computes with "
                f"hidden_size / num_attention_heads = {derived}"
            )
        _refuse_sizes(dims, whole_heads=not self.own_head_dim)


def _refuse_sizes(dims: ModelDims, *, whole_heads: bool) -> None:
    if whole_heads and dims.hidden_size % dims.num_heads:
        raise UnsupportedModelError(
            f"config.json sets hidden_size to {dims.hidden_size}, which {dims.num_heads} heads do not divide"
        )
    if dims.num_heads % dims.num_kv_heads:
        raise UnsupportedModelError(
            f"config.json sets num_attention_heads to {dims.num_heads}, "
            f"which num_key_value_heads {dims.num_kv_heads} does not divide"
        )
    if dims.head_dim % 2:
        raise UnsupportedModelError(
            f"a head has {dims.head_dim} dimensions; rotary positions need an even number"
        )
