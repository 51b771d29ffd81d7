"""Rope settings of a config.json, in the spelling of either generation of transformers."""

from __future__ import annotations

from typing import Any

import pytest

from peft_deploy.errors import CheckpointError, UnsupportedModelError
from peft_deploy.families import find_family

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "scaling", [{"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}, LLAMA3]
)
def test_both_spellings_mean_the_same(scaling: dict[str, Any]) -> None:
    old = {**CONFIG, "rope_theta": 500000.0, "rope_scaling": scaling}
    new = {**CONFIG, "rope_parameters": {"rope_theta": 500000.0, **scaling}}
    family = find_family(CONFIG)

    assert family.paddle_arguments(new) == family.paddle_arguments(old)
    assert family.paddle_arguments(new)["rope_theta"] == 500000.0
    assert family.dims(new) == family.dims(old)
    assert family.huggingface_config(new) == family.huggingface_config(old)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor to 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor to 0.5"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
    ],
)
def test_what_paddlenlp_would_ignore_is_refused(entries: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        find_family(CONFIG).paddle_arguments({**CONFIG, **entries})


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_an_entry_that_is_no_object_is_damage(key: str) -> None:
    with pytest.raises(CheckpointError, match=f"{key} to 'linear'; it must be an object"):
        find_family(CONFIG).paddle_arguments({**CONFIG, key: "linear"})
