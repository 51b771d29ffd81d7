"""Llama, Qwen2, Mistral, Gemma: Hugging Face's names and configurations, and what they compute."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy_rotary
import paddle
import pytest
from model_recipes import load_recipe
from published import check_names, check_published
from safetensors.numpy import load_file

import peft_deploy
from peft_deploy.base import open_base
from peft_deploy.base.dygraph import load_model
from peft_deploy.config.export import ExportOptions
from peft_deploy.errors import AdapterError, CheckpointError, UnsupportedModelError
from peft_deploy.families import find_family, parallel_axes
from peft_deploy.weights.layout import HuggingFaceTensors

tiny = load_recipe("tiny")
NAMES = [n for n in tiny.known() if n.startswith(("llama", "qwen2", "mistral", "gemma"))]
FUSED = [n for n in NAMES if n.endswith("fused")]
IDS = np.array([3, 7, 99, 130, 4, 4, 60, 7, 21, 11, 120, 64, 65, 1, 88, 2, 2, 45, 9, 100])

# What the published files hold, but for keys that change nothing that is computed.
LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
QWEN2_5_HALF_B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
GEMMA_2B = {
    "architectures": ["GemmaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_activation": None,
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 16384,
    "max_position_embeddings": 8192,
    "model_type": "gemma",
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "vocab_size": 256000,
}


@pytest.mark.parametrize(
    ("config", "sizes", "arguments"),
    [
        (
            LLAMA_3_1_8B,
            (32, 4096, 32, 8, 128, 128256, 131072),
            {"eos_token_id": 128001, "rope_scaling": LLAMA_3_1_8B["rope_scaling"]},
        ),
        (QWEN2_5_HALF_B, (24, 896, 14, 2, 64, 151936, 32768), {"tie_word_embeddings": True}),
        (MISTRAL_7B, (32, 4096, 32, 8, 128, 32000, 32768), {"rms_norm_eps": 1e-5}),
        (
            GEMMA_2B,
            (18, 2048, 8, 1, 256, 256000, 8192),
            {"tie_word_embeddings": True, "head_dim": 256},
        ),
    ],
)
def test_published_configurations(
    config: dict[str, Any], sizes: tuple[int, ...], arguments: dict[str, Any]
) -> None:
    check_published(config, sizes, arguments)
    family = find_family(config)
    assert not family.remarks(family.huggingface_config(config))


@pytest.mark.parametrize("name", NAMES)
def test_the_map_names_every_parameter(name: str) -> None:
    check_names(tiny.config_of(name))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in FUSED])
def test_both_layouts_are_one_model_that_computes_what_the_papers_say(
    name: str, tmp_path: Path
) -> None:
    ours = open_base(tiny.make(tmp_path / "pd", name))
    folder = tiny.make(tmp_path / "hf", name, layout="huggingface")
    theirs = open_base(folder)
    assert (ours.tensors.layout, theirs.tensors.layout) == ("paddlenlp", "huggingface")
    assert ours.fingerprint == theirs.fingerprint

    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    with paddle.no_grad():
        found = load_model(theirs)(paddle.to_tensor(IDS[None]), use_cache=True)[0].numpy()[0]
        same = load_model(ours)(paddle.to_tensor(IDS[None]), use_cache=True)[0].numpy()[0]
    wanted = numpy_rotary.logits(
        {n: a.astype(np.float64) for n, a in weights.items()}, config, IDS
    )
    assert wanted.std() > 0.5
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())
    np.testing.assert_allclose(same, found, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("name", FUSED)
def test_fused_weights_have_no_place_in_hugging_face_s_layout(name: str, tmp_path: Path) -> None:
    base = open_base(tiny.make(tmp_path, name))
    with pytest.raises(CheckpointError, match=r"no place(.|\n)*gate_up_fused_proj(.|\n)*qkv_proj"):
        HuggingFaceTensors(base.tensors, base.names)


@pytest.mark.parametrize("name", FUSED)
def test_fused_weights_are_not_joined_from_ranks(name: str) -> None:
    """No one axis spreads the two halves of gate and up, so shards of such an adapter are refused by name."""
    config = tiny.config_of(name)
    family = find_family(config)
    axis_of = parallel_axes(family, config, 2)
    for module in ("self_attn.qkv_proj", "mlp.gate_up_fused_proj"):
        with pytest.raises(AdapterError, match=rf"no layer .*{module}"):
            axis_of(f"{family.model_type}.layers.1.{module}.lora_B")
    assert axis_of(f"{family.model_type}.layers.1.mlp.down_proj.lora_A") == 0


@pytest.mark.parametrize(
    ("name", "entries", "said"),
    [
        ("llama", {"attention_bias": True}, "attention_bias: biases"),
        ("llama", {"mlp_bias": True}, "mlp_bias: biases"),
        ("llama", {"alibi": True}, "alibi: ALiBi"),
        ("llama", {"use_long_sequence_strategies": True}, "long-sequence strategies"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act to 'gelu'"),
        ("llama", {"head_dim": 16}, "head_dim to 16.* = 10"),
        ("llama", {"hidden_size": 64}, "64, which 6 heads do not divide"),
        ("llama", {"num_key_value_heads": 4}, "num_key_value_heads 4 does not divide"),
        ("llama", {"hidden_size": 54}, "9 dimensions; rotary positions need an even"),
        ("llama", {"rope_scaling_type": "dynamic_ntk"}, "changes with the length"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "changes with the length"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn', which"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor None"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor None"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act to 'gelu'"),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "Qwen2 ignores it"),
        ("qwen2", {"rope_scaling_type": "linear"}, "'linear'; PaddleNLP's Qwen2 ignores"),
        ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 8}}, "dual chunk attention"),
        ("mistral", {"tie_word_embeddings": True}, "tie_word_embeddings: a head that shares"),
        ("mistral", {"head_dim": 16}, "head_dim to 16"),
        ("mistral", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "Mistral ignores"),
        ("mistral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor to 0.5"),
        ("mistral", {"pad_token_id": 131}, "pad_token_id to 131.* its 131 tokens"),
        (
            "gemma",
            {"hidden_act": "silu", "hidden_activation": None},
            "hidden_act to 'silu'",
        ),
        ("gemma", {"hidden_activation": "relu"}, "hidden_act to 'relu'"),
        ("gemma", {"attention_bias": True}, "attention_bias: biases"),
        ("gemma", {"use_bidirectional_attention": True}, "attention to later tokens"),
        ("gemma", {"rope_scaling_type": "ntk"}, "Gemma ignores it"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused_by_name(
    name: str, entries: dict[str, Any], said: str
) -> None:
    config = tiny.config_of(name, **entries)
    with pytest.raises(UnsupportedModelError, match=said):
        find_family(config).paddle_arguments(config)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (MISTRAL_7B, "sliding_window to 4096.*texts longer than 4096"),
        ({**QWEN2_5_HALF_B, "use_sliding_window": True}, "use_sliding_window.*longer than 32768"),
        ({**GEMMA_2B, "hidden_activation": "gelu_pytorch_tanh"}, "gelu_pytorch_tanh.*erf form"),
        (GEMMA_2B, "gives nothing as hidden_activation.*erf form"),
    ],
)
def test_remarks_say_where_transformers_computes_something_else(
    config: dict[str, Any], said: str
) -> None:
    family = find_family(config)
    (remark,) = family.remarks(config)
    assert re.search(said, remark)


def test_an_export_passes_the_remark_on(tmp_path: Path) -> None:
    base = tiny.make(tmp_path / "base", "mistral")
    with pytest.warns(UserWarning, match="sliding_window to 5; PaddleNLP's Mistral attends"):
        peft_deploy.export(base, tmp_path / "out", options=ExportOptions(dry_run=True))


@pytest.mark.parametrize(
    "config",
    [
        LLAMA_3_1_8B,
        QWEN2_5_HALF_B,
        {**MISTRAL_7B, "sliding_window": None},
        {**GEMMA_2B, "hidden_activation": "gelu"},
    ],
)
def test_most_models_need_no_remark(config: dict[str, Any]) -> None:
    assert find_family(config).remarks(config) == ()


def test_ntk_scaling_is_another_base_to_hugging_face() -> None:
    config = tiny.config_of("llama-ntk")
    written = find_family(config).huggingface_config(config)
    assert written["rope_scaling"] is None
    assert written["max_position_embeddings"] == 128
    assert written["rope_theta"] == pytest.approx(10000.0 * 2.0 ** (10 / 8))


def test_kv_heads_that_are_not_given() -> None:
    """Left out, both libraries take their class's default; null means as many as heads."""
    config = tiny.config_of("mistral", num_attention_heads=12, hidden_size=96)
    assert find_family(config).dims({**config, "num_key_value_heads": None}).num_kv_heads == 12
    del config["num_key_value_heads"]
    assert find_family(config).dims(config).num_kv_heads == 8
