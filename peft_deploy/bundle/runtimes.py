"""The configuration files of other runtimes, made from what is known of the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft_deploy.families import ModelDims
from peft_deploy.signature import (
    ATTENTION_MASK,
    INPUT_IDS,
    LOGITS,
    PAST_KEY_TEMPLATE,
    PAST_VALUE_TEMPLATE,
    POSITION_IDS,
    PRESENT_KEY_TEMPLATE,
    PRESENT_VALUE_TEMPLATE,
)


@dataclass(frozen=True)
class SpecialTokenIds:
    """Token ids with a meaning to a generation loop."""

    bos: int | None
    eos: tuple[int, ...]
    pad: int


def special_token_ids(
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any] | None,
    tokenizer_ends: Sequence[int] = (),
) -> SpecialTokenIds:
    """Begin, end and padding ids; generation_config.json has the last word, as in transformers.

    Padding falls back to the first end id, and to 0 when there is none: padded positions are masked, so any id
    of the vocabulary will do.

    Args:
        config: the contents of config.json.
        generation_config: those of generation_config.json, if there is one.
        tokenizer_ends: ids that end a text as the tokenizer's files say, which ``generate`` stops at, too.
    """
    sources = [generation_config or {}, config]

    def first(key: str) -> Any:
        return next((s[key] for s in sources if s.get(key) is not None), None)

    eos = first("eos_token_id")
    ends = tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,)
    vocab = config["vocab_size"]
    ends = tuple(dict.fromkeys(end for end in (*ends, *tokenizer_ends) if 0 <= end < vocab))
    pad = first("pad_token_id")
    if pad is None or not 0 <= pad < vocab:
        pad = ends[0] if ends else 0
    return SpecialTokenIds(first("bos_token_id"), ends, pad)


def genai_config(
    model_type: str, dims: ModelDims, tokens: SpecialTokenIds, inputs: Collection[str]
) -> dict[str, Any]:
    """``genai_config.json`` for onnxruntime-genai 0.18, which refuses unknown keys.

    Args:
        model_type: a type name that onnxruntime-genai knows.
        dims: the model's sizes.
        tokens: special token ids.
        inputs: names of the graph's inputs.
    """
    own = {name: name for name in (INPUT_IDS, ATTENTION_MASK, POSITION_IDS) if name in inputs}
    model: dict[str, Any] = {
        "type": model_type,
        "vocab_size": dims.vocab_size,
        "context_length": dims.max_positions,
        "pad_token_id": tokens.pad,
        "decoder": {
            "filename": "model.onnx",
            "hidden_size": dims.hidden_size,
            "num_attention_heads": dims.num_heads,
            "num_key_value_heads": dims.num_kv_heads,
            "head_size": dims.head_dim,
            "num_hidden_layers": dims.num_layers,
            "session_options": {
                "log_id": "onnxruntime-genai",
                "log_severity_level": 3,
                "provider_options": [],
            },
            "inputs": {
                **own,
                "past_key_names": PAST_KEY_TEMPLATE,
                "past_value_names": PAST_VALUE_TEMPLATE,
            },
            "outputs": {
                "logits": LOGITS,
                "present_key_names": PRESENT_KEY_TEMPLATE,
                "present_value_names": PRESENT_VALUE_TEMPLATE,
            },
        },
    }
    if tokens.eos:  # without any, onnxruntime-genai ends a text at the padding's id
        model["eos_token_id"] = list(tokens.eos)
    if tokens.bos is not None:
        model["bos_token_id"] = tokens.bos
    # The cache is concatenated by the graph, so past and present cannot share one buffer.
    search = {"max_length": dims.max_positions, "past_present_share_buffer": False}
    return {"model": model, "search": search}
