"""Models that do not run in PaddleNLP: said before any work, and still so."""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

import peft_deploy
from peft_deploy.errors import UnsupportedModelError
from peft_deploy.families import find_family
from peft_deploy.families.broken import BROKEN

SIZES = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4,
        "original_max_position_embeddings": 16,
        "mscale": 0.7,
        "mscale_all_dim": 0.7,
    },
}
YUAN = {
    "pad_token_id": 1,
    "eod_token": 3,
    "sep_token": 4,
    "mask_token": 5,
    "use_loss_mask": False,
    "causal_mask": True,
    "reset_position_ids": True,
    "reset_attention_mask": True,
}
GPTJ = {"vocab_size": 131, "n_embd": 48, "n_layer": 2, "n_head": 6, "rotary_dim": 4}
INT64_BY_INT32 = "x: int64, y: int32"
# Architecture → configuration, and what Paddle says when a small model of it is called.
RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "MixtralForCausalLM": ({**SIZES, "num_local_experts": 4}, "Broadcast dimension mismatch"),
    "Qwen2MoeForCausalLM": (
        {**SIZES, **EXPERTS, "shared_expert_intermediate_size": 32},
        INT64_BY_INT32,
    ),
    "DeepseekV2ForCausalLM": ({**SIZES, **DEEPSEEK}, INT64_BY_INT32),
    "DeepseekV3ForCausalLM": (
        {**SIZES, **DEEPSEEK, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
        INT64_BY_INT32,
    ),
    "GPTJForCausalLM": (GPTJ, "must be Tensor, but got bool"),
    "YuanForCausalLM": ({**SIZES, **YUAN}, "Attention mask should be of size"),
}


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_the_error_says_which_and_why(name: str) -> None:
    for config in ({"architectures": [name]}, {"model_type": BROKEN[name].model_type}):
        with pytest.raises(UnsupportedModelError, match=f"{name} cannot be exported") as caught:
            find_family(config)
        assert BROKEN[name].reason in str(caught.value)


def test_it_is_said_before_any_work(tmp_path: Path) -> None:
    """No weights are there yet to be missed."""
    base = tmp_path / "base"
    base.mkdir()
    config = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", **SIZES}
    (base / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(UnsupportedModelError, match="MixtralForCausalLM cannot be exported"):
        peft_deploy.export(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_it_still_does_not_run(name: str) -> None:
    """When this turns red, the model runs, and what is said of it is no longer true."""
    import paddle

    config, said = RUNS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = importlib.import_module("paddlenlp.transformers")
        config_class = getattr(models, name.replace("ForCausalLM", "Config"))
        model = getattr(models, name)(config_class(**config))
        model.eval()
        ids = paddle.to_tensor([[3, 4, 5, 6, 7]])
        with pytest.raises((ValueError, TypeError), match=said):
            past = model(input_ids=ids, use_cache=True, return_dict=False)[1]
            mask = paddle.ones([1, 6], dtype="int64")
            model(ids[:, :1], attention_mask=mask, past_key_values=past)
