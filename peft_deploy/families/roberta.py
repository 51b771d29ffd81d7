"""RoBERTa (Liu et al. 2019)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from peft_deploy.families.encoder import EncoderFamily, Head
from peft_deploy.families.encoder_names import linear_rules, norm_rules, tied_rules
from peft_deploy.families.family import ModelDims
from peft_deploy.families.names import NameRule
from peft_deploy.families.registry import register

if TYPE_CHECKING:
    from paddle import nn


@register
class Roberta(EncoderFamily):
    """BERT whose positions begin behind the padding token's id and count the tokens that are not padding."""

    model_type = "roberta"
    heads = {
        "RobertaModel": "embedding",
        "RobertaForSequenceClassification": "sequence",
        "RobertaForTokenClassification": "tokens",
        "RobertaForQuestionAnswering": "answer",
        "RobertaForMaskedLM": "masked",
    }
    architectures = {name: name for name in heads}
    prefix = "roberta"
    poolers = frozenset({"embedding"})
    pooled = frozenset()
    paddle_config = "RobertaConfig"

    def head_rules(self, head: Head) -> Iterable[NameRule]:
        """See :meth:`EncoderFamily.head_rules`."""
        if head == "sequence":
            for layer in ("classifier.dense", "classifier.out_proj"):
                yield from linear_rules(layer, layer)
        elif head == "tokens":
            yield from linear_rules("classifier", "classifier")
        elif head == "answer":
            yield from linear_rules("classifier", "qa_outputs")
        elif head == "masked":
            yield from linear_rules("lm_head.dense", "lm_head.dense")
            yield from norm_rules("lm_head.layer_norm", "lm_head.layer_norm")
            yield from tied_rules("lm_head.decoder", ("lm_head.bias", "lm_head.bias"))

    def tied_head(self) -> Mapping[str, str]:
        """See :meth:`EncoderFamily.tied_head`."""
        return {
            "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
            "lm_head.decoder.bias": "lm_head.bias",
        }

    def dims(self, config: Mapping[str, Any]) -> ModelDims:
        """See :meth:`Family.dims`; the first rows of the position table belong to padding."""
        dims = super().dims(config)
        pad = config.get("pad_token_id") or 0
        return replace(dims, max_positions=dims.max_positions - pad - 1)

    def stand_in(self, model: nn.Layer) -> nn.Layer:
        """See :meth:`Family.stand_in`."""
        from peft_deploy.families.standins.encoder import RobertaStandIn

        return RobertaStandIn(model, *self._parts(model), self._pooling)
