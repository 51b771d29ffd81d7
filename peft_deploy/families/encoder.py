"""Encoders of BERT's kind (Devlin et al. 2019): one description, of which each family is a variant."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peft_deploy.errors import UnsupportedModelError
from peft_deploy.families.encoder_names import EncoderNames, encoder_rules
from peft_deploy.families.family import Family, ModelDims
from peft_deploy.families.names import NameMap, NameRule
from peft_deploy.families.packing import PackRule
from peft_deploy.families.pooling import Pooling
from peft_deploy.signature import (
    BATCH,
    END_LOGITS,
    LAST_HIDDEN_STATE,
    LOGITS,
    SENTENCE_EMBEDDING,
    SEQUENCE,
    START_LOGITS,
    GraphSignature,
    encoder_signature,
)

if TYPE_CHECKING:
    from paddle import Tensor, nn

Head = Literal["embedding", "sequence", "tokens", "answer", "masked"]
_PEFT_TASKS: Mapping[Head, str] = {
    "embedding": "FEATURE_EXTRACTION",
    "sequence": "SEQ_CLS",
    "tokens": "TOKEN_CLS",
    "answer": "QUESTION_ANS",
}

# PaddleNLP takes the activation by its name in paddle.nn.functional; these convert as they are.
ACTIVATIONS = ("gelu", "relu", "silu", "swish", "tanh")
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)
# Other entries, and what PaddleNLP's configuration classes take where config.json has none.
_DEFAULTS = {
    "max_position_embeddings": 512,
    "type_vocab_size": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "initializer_range": 0.02,
}
# Entries that mean something to tokenizers and to users of the results, and nothing to the graph.
_EXTRAS = ("pool_act", "use_task_id", "task_id", "task_type_vocab_size")
_CARRIED = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "problem_type")
_REFUSED = {
    "is_decoder": "causal attention",
    "add_cross_attention": "cross-attention",
    "fuse": "PaddleNLP's fused encoder layers",
    "pruned_heads": "attention that has lost some of its heads",
}


class EncoderFamily(Family):
    """Post-norm encoders with learned positions and one head on top.

    The graph takes ``input_ids``, ``attention_mask`` and, where the model knows more than one segment,
    ``token_type_ids``. A row may have padding on either side: positions are counted from the first token that the
    mask keeps, and what looks at a text's first token looks at that one.

    Attributes:
        heads: architecture → its head; the keys are those of ``architectures``.
        prefix: name of the encoder inside a model with a head, PaddleNLP's and Hugging Face's.
        poolers: the heads whose models have a pooler in PaddleNLP, whether they use it or not.
        pooled: the heads that use it.
    """

    heads: ClassVar[Mapping[str, Head]]
    prefix: ClassVar[str]
    poolers: ClassVar[frozenset[Head]] = frozenset(
        {"embedding", "sequence", "tokens", "answer", "masked"}
    )
    pooled: ClassVar[frozenset[Head]] = frozenset({"sequence"})
    inert = frozenset({"tie_word_embeddings"})
    lora_targets = (
        r".*self_attn\.(q|k|v|out)_proj",
        r".*encoder\.layers\.\d+\.linear[12]",
    )
    _pooling: Pooling | None = None

    @abstractmethod
    def head_rules(self, head: Head) -> Iterable[NameRule]:
        """Names of a head's own parameters."""

    @abstractmethod
    def tied_head(self) -> Mapping[str, str]:
        """What the head of a masked language model shares with the encoder; see :meth:`Family.tied`."""

    def epsilon(self, config: Mapping[str, Any]) -> float:
        """What the layer norms add to the variance."""
        return float(_entry(config, "layer_norm_eps"))

    def configured(self, config: Mapping[str, Any]) -> EncoderFamily:
        """See :meth:`Family.configured`: how sentence embeddings are pooled."""
        twin = copy.copy(self)
        twin._pooling = Pooling.of(config) if self.pools(config) else None
        return twin

    def peft_task(self, config: Mapping[str, Any]) -> str | None:
        """See :meth:`Family.peft_task`."""
        return _PEFT_TASKS.get(self.head(config))

    def head(self, config: Mapping[str, Any]) -> Head:
        """The head of the model that a config.json describes."""
        named = config.get("architectures") or []
        return next((self.heads[n] for n in named if n in self.heads), "embedding")

    def pools(self, config: Mapping[str, Any]) -> bool:
        """See :meth:`Family.pools`."""
        return self.head(config) == "embedding"

    def names(self, config: Mapping[str, Any]) -> NameMap:
        """See :meth:`Family.names`."""
        head, prefix = self.head(config), self._prefix(config)
        encoder = encoder_rules(
            prefix,
            token_types=_entry(config, "type_vocab_size") > 0,
            task_types=bool(config.get("use_task_id")),
            pooler=head in self.poolers,
        )
        dotted = prefix.replace(".", r"\.")
        ignored = [
            rf"{dotted}embeddings\.(position_ids|token_type_ids)",
            r"cls\.seq_relationship\..*",
        ]
        if head not in self.poolers:
            ignored.append(rf"{dotted}pooler\..*")
        return EncoderNames([*encoder, *self.head_rules(head)], ignored)

    def pack_rules(self, config: Mapping[str, Any]) -> tuple[PackRule, ...]:
        """See :meth:`Family.pack_rules`."""
        parent = f"{self._prefix(config)}encoder.layers.{{i}}.self_attn"
        return (PackRule(parent, ("q_proj", "k_proj", "v_proj"), "qkv_proj"),)

    def _prefix(self, config: Mapping[str, Any]) -> str:
        return "" if self.head(config) == "embedding" else f"{self.prefix}."

    def tied(self, config: Mapping[str, Any]) -> Mapping[str, str]:
        """See :meth:`Family.tied`."""
        return self.tied_head() if self.head(config) == "masked" else {}

    def unused(self, config: Mapping[str, Any]) -> frozenset[str]:
        """See :meth:`Family.unused`: the pooler, where the head does not look at it."""
        head = self.head(config)
        if head not in self.poolers or head in self.pooled:
            return frozenset()
        return frozenset(f"{self._prefix(config)}pooler.dense.{own}" for own in ("weight", "bias"))

    def paddle_arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See :meth:`Family.paddle_arguments`."""
        for key, feature in _REFUSED.items():
            if config.get(key):
                raise UnsupportedModelError(
                    f"config.json sets {key}: {feature} cannot be exported"
                )
        kind = config.get("position_embedding_type") or "absolute"
        if kind != "absolute":
            raise UnsupportedModelError(
                f"config.json sets position_embedding_type to {kind!r}; "
                f"PaddleNLP's {self.paddle_model(config)} has absolute positions only"
            )
        if (act := _entry(config, "hidden_act")) not in ACTIVATIONS:
            raise UnsupportedModelError(
                f"config.json sets hidden_act to {act!r}; exported are {', '.join(ACTIVATIONS)}"
            )
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        if hidden % heads:
            raise UnsupportedModelError(
                f"config.json sets hidden_size to {hidden}, which {heads} attention heads cannot share"
            )
        return {
            **{key: config[key] for key in _SIZES},
            **{key: _entry(config, key) for key in _DEFAULTS},
            **{key: config[key] for key in (*_CARRIED, *_EXTRAS) if config.get(key) is not None},
            **_named(labels(config)),
            **({} if self._pooling is None else self._pooling.into({})),
            "use_cache": False,
        }

    def dims(self, config: Mapping[str, Any]) -> ModelDims:
        """See :meth:`Family.dims`."""
        heads = config["num_attention_heads"]
        return ModelDims(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=config["hidden_size"] // heads,
            vocab_size=config["vocab_size"],
            max_positions=_entry(config, "max_position_embeddings"),
        )

    def huggingface_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See :meth:`Family.huggingface_config`."""
        head = self.head(config)
        named = _named(labels(config))
        named["id2label"] = {str(i): name for i, name in named["id2label"].items()}
        return {
            "model_type": self.model_type,
            "architectures": [self.paddle_model(config)],
            **{key: config[key] for key in _SIZES},
            **{key: _entry(config, key) for key in _DEFAULTS},
            "layer_norm_eps": self.epsilon(config),
            "position_embedding_type": "absolute",
            **{key: config[key] for key in _CARRIED if config.get(key) is not None},
            **(named if head in ("sequence", "tokens") else {}),
            **({} if self._pooling is None else self._pooling.into({})),
        }

    def settle(self, model: nn.Layer) -> None:
        """See :meth:`Family.settle`: the epsilon of the layer norms."""
        from peft_deploy.families.standins.encoder import set_epsilon

        set_epsilon(model, self.epsilon(model.config.to_dict()))

    def stand_in(self, model: nn.Layer) -> nn.Layer:
        """See :meth:`Family.stand_in`."""
        from peft_deploy.families.standins.encoder import EncoderStandIn

        return EncoderStandIn(model, *self._parts(model), self._pooling)

    def _parts(self, model: nn.Layer) -> tuple[nn.Layer, Head]:
        head = self.heads[type(model).__name__]
        return (model if head == "embedding" else getattr(model, self.prefix)), head

    def run_eagerly(
        self, model: nn.Layer, feeds: Mapping[str, Tensor], signature: GraphSignature
    ) -> dict[str, Tensor]:
        """See :meth:`Family.run_eagerly`."""
        from peft_deploy.families.eager_encoder import run_encoder

        return run_encoder(model, feeds, signature, self._pooling)

    def signature(self, config: Mapping[str, Any], dtype: str = "float32") -> GraphSignature:
        """See :meth:`Family.signature`."""
        hidden, classes = config["hidden_size"], len(labels(config))
        outputs: dict[Head, dict[str, tuple[int | str, ...]]] = {
            "embedding": {LAST_HIDDEN_STATE: (BATCH, SEQUENCE, hidden)},
            "sequence": {LOGITS: (BATCH, classes)},
            "tokens": {LOGITS: (BATCH, SEQUENCE, classes)},
            "answer": {START_LOGITS: (BATCH, SEQUENCE), END_LOGITS: (BATCH, SEQUENCE)},
            "masked": {LOGITS: (BATCH, SEQUENCE, config["vocab_size"])},
        }
        chosen = outputs[self.head(config)]
        if self._pooling is not None:
            chosen[SENTENCE_EMBEDDING] = (BATCH, hidden)
        several = _entry(config, "type_vocab_size") > 1
        return encoder_signature(chosen, token_types=several, dtype=dtype)


def labels(config: Mapping[str, Any]) -> dict[int, str]:
    """Class → its name, in order; two classes where config.json does not say, as in both libraries."""
    if named := config.get("id2label"):
        return {int(i): str(name) for i, name in sorted(named.items(), key=lambda x: int(x[0]))}
    count = config.get("num_labels") or config.get("num_classes") or 2
    return {i: f"LABEL_{i}" for i in range(count)}


def _named(classes: Mapping[int, str]) -> dict[str, Any]:
    return {"id2label": dict(classes), "label2id": {name: i for i, name in classes.items()}}


def _entry(config: Mapping[str, Any], key: str) -> Any:
    value = config.get(key)
    return _DEFAULTS[key] if value is None else value
