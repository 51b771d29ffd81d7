"""Entries of a config.json that nobody looks at: what they ask for is not computed, and no check can show it.

The reference of a check is PaddleNLP's model, built from the same file. So a feature that a family does not know and
PaddleNLP ignores is missing on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from textwrap import shorten
from typing import Any

from peft_deploy.families.family import Family

# Regular expressions, by what the entries are about. None of them changes what a model computes from its weights.
_INERT = {
    "what the model is, and what wrote the file": (
        r"_name_or_path|name_or_path|model_type|architectures|auto_map|_commit_hash|_?attn_implementation.*",
        r"(torch_)?dtype|use_bfloat16|(transformers|paddlenlp|unsloth|peft)_version|unsloth_fixed",
        r"transformers\.js_config|sentence_transformers|language|license|finetuning_task|task_specific_params",
        r"tokenizer_(class|type)|model_max_length|problem_type|directionality|pooler_.*",
    ),
    "how it is called": (
        r"(use_)?return_dict|return_dict_in_generate|output_(attentions|hidden_states|scores|past)|torchscript",
        r"use_cache|chunk_size_feed_forward|tf_legacy_loss|is_(encoder_)?decoder|tie_encoder_decoder",
    ),
    "names of classes, and heads that are not exported": (
        r"id2label|label2id|num_(labels|choices|classes)|summary_.*",
    ),
    "generating": (
        r".*_token_ids?|do_sample|temperature|top_[kp]|typical_p|(repetition|length|diversity)_penalty",
        r"(encoder_)?no_repeat_ngram_size|num_beams|num_beam_groups|num_return_sequences|early_stopping",
        r"(min|max)_(new_tokens|length)|bad_words_ids|(begin_)?suppress_tokens|remove_invalid_values|prefix",
        r"exponential_decay_length_penalty|use_(last_token|flash_attention)_for_generation|immediate_clear_.*",
    ),
    "training": (
        r".*dropout.*|[a-z]+_pdrop|layerdrop|drop_path_rate|initializer_.*|init_std|gradient_checkpointing",
        r".*recompute.*|ignore_index|dpo_config|pretraining_tp|mp_degree|num_partitions|virtual_pp_degree",
        r"(tensor|pipeline|sep|context|sequence)_parallel.*",
    ),
    "faster kernels, and strategies that have a switch of their own": (
        r"use_(flash|fused|fast)_.*|fuse_.*|_flash_attn_.*|long_sequence_(strategy|init)_.*",
    ),
}
_INERT_PATTERN = re.compile("|".join(pattern for about in _INERT.values() for pattern in about))
# What is off by null, false, 0 or nothing at all; but these ask for something by being off.
_MEANT_WHEN_OFF = re.compile(r"(is_)?causal|use_causal_mask|use_ro(pe|tary).*|use_position_.*")

_SHOWN = 60  # characters of a value in a message


def unread_entries(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that a family does not look at and that are not known to change nothing.

    Args:
        family: that claims the configuration, and does not refuse it.
        config: contents of config.json.

    Returns:
        Entry → its value, in the file's order.
    """
    read = read_entries(family, config)
    return {
        key: value
        for key, value in config.items()
        if key not in read
        and not is_inert(family, key)
        and (value or (value is not None and _MEANT_WHEN_OFF.fullmatch(key)))
    }


def describe_unread(entries: Mapping[str, Any], model: str) -> list[str]:
    """A sentence for people; none where there are no such entries.

    Args:
        entries: from :func:`unread_entries`.
        model: PaddleNLP's class.
    """
    if not entries:
        return []
    named = ", ".join(f"{key} = {shorten(repr(value), _SHOWN)}" for key, value in entries.items())
    return [
        f"config.json has entries that nothing here reads: {named}. If one of them changes what the model computes, "
        f"the bundle does not have that, and no check shows it, as PaddleNLP's {model} ignores them, too"
    ]


def is_inert(family: Family, key: str) -> bool:
    """Whether an entry is known to change nothing that a model of the family computes."""
    return key in family.inert or _INERT_PATTERN.fullmatch(key) is not None


def read_entries(family: Family, config: Mapping[str, Any]) -> set[str]:
    """The entries that a family asks for, whether they are there or not.

    Args:
        family: that claims the configuration, and does not refuse it.
        config: contents of config.json.
    """
    watched = _Watched(config)
    family = family.configured(watched)
    family.paddle_arguments(watched)
    family.names(watched)
    family.tied(watched)
    family.dims(watched)
    family.remarks(watched)
    return watched.asked


class _Watched(Mapping[str, Any]):
    """A configuration that remembers what it was asked for."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self.asked = set[str]()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return self._config[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._config)

    def __len__(self) -> int:
        return len(self._config)
