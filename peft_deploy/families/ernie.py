"""ERNIE (Sun et al. 2019 and 2020; ERNIE 1.0 to 3.0)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_deploy.families.bert import BertLike
from peft_deploy.families.registry import register

_EPSILON = 1e-12


@register
class Ernie(BertLike):
    """BERT with embeddings of tasks, which are the same for every token and part of the graph."""

    model_type = "ernie"
    heads = {
        "ErnieModel": "embedding",
        "ErnieForSequenceClassification": "sequence",
        "ErnieForTokenClassification": "tokens",
        "ErnieForQuestionAnswering": "answer",
        "ErnieForMaskedLM": "masked",
    }
    architectures = {name: name for name in heads}
    prefix = "ernie"
    paddle_config = "ErnieConfig"

    def epsilon(self, config: Mapping[str, Any]) -> float:
        """PaddleNLP's ERNIE computes with 1e-12 whatever its configuration says."""
        return _EPSILON

    def remarks(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """See :meth:`Family.remarks`."""
        remarks = []
        said, task = config.get("layer_norm_eps"), config.get("task_id") or 0
        if said not in (None, _EPSILON):
            remarks.append(
                f"config.json sets layer_norm_eps to {said}; PaddleNLP's ERNIE computes with "
                f"{_EPSILON} whatever it says, and so does the bundle"
            )
        if config.get("use_task_id") and task != 0:
            remarks.append(
                f"config.json sets task_id to {task}, which is part of the bundle's graph; "
                "transformers takes task 0 unless it is told otherwise"
            )
        return tuple(remarks)

    def huggingface_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See :meth:`Family.huggingface_config`."""
        tasks = {
            k: config[k] for k in ("use_task_id", "task_id", "task_type_vocab_size") if k in config
        }
        return {**super().huggingface_config(config), **tasks}
