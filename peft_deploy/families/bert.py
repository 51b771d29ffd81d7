"""BERT (Devlin et al. 2019): BERT, MiniLM, and most sentence encoders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from peft_deploy.families.encoder import EncoderFamily, Head
from peft_deploy.families.encoder_names import linear_rules, norm_rules, tied_rules
from peft_deploy.families.names import NameRule
from peft_deploy.families.registry import register


class BertLike(EncoderFamily):
    """The heads of BERT and ERNIE."""

    def head_rules(self, head: Head) -> Iterable[NameRule]:
        """See :meth:`EncoderFamily.head_rules`."""
        if head in ("sequence", "tokens"):
            yield from linear_rules("classifier", "classifier")
        elif head == "answer":
            yield from linear_rules("classifier", "qa_outputs")
        elif head == "masked":
            inside = "cls.predictions."
            yield from linear_rules(f"{inside}transform", f"{inside}transform.dense")
            yield from norm_rules(f"{inside}layer_norm", f"{inside}transform.LayerNorm")
            yield from tied_rules(f"{inside}decoder", (f"{inside}decoder_bias", f"{inside}bias"))

    def tied_head(self) -> Mapping[str, str]:
        """See :meth:`EncoderFamily.tied_head`."""
        decoder = "cls.predictions.decoder"
        return {
            f"{decoder}.weight": f"{self.prefix}.embeddings.word_embeddings.weight",
            f"{decoder}.bias": f"{decoder}_bias",
        }


@register
class Bert(BertLike):
    """BERT."""

    model_type = "bert"
    heads = {
        "BertModel": "embedding",
        "BertForSequenceClassification": "sequence",
        "BertForTokenClassification": "tokens",
        "BertForQuestionAnswering": "answer",
        "BertForMaskedLM": "masked",
    }
    architectures = {name: name for name in heads}
    prefix = "bert"
    paddle_config = "BertConfig"
