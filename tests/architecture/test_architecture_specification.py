"""The names of the specification, importable from the package itself."""

from __future__ import annotations

import subprocess
import sys

import pytest

import peft_deploy
from peft_deploy.environment import require_paddle

NAMES = [
    "ColumnParallelLoRALinear",
    "ColumnParallelLoRAMergedLinear",
    "LoRAConfig",
    "LoRAConv2D",
    "LoRAEmbedding",
    "LoRALinear",
    "LoRAMergedLinear",
    "LoRAModel",
    "PrefixConfig",
    "PrefixModel",
    "PrefixModelForCausalLM",
    "RowParallelLoRALinear",
    "bloom_postprocess_past_key_value",
    "chatglm_postprocess_past_key_value",
    "llama_postprocess_past_key_value",
    "mark_only_lora_as_trainable",
    "mistral_postprocess_past_key_value",
    "qwen_postprocess_past_key_value",
]


@pytest.mark.parametrize("name", NAMES)
def test_the_name_is_there(name: str) -> None:
    require_paddle("this test")
    assert name in peft_deploy.__all__
    assert getattr(peft_deploy, name).__name__.startswith(name)  # PrefixModel is a second name


def test_configurations_need_no_paddle() -> None:
    script = (
        "import sys; sys.modules['paddle'] = None\n"
        "from peft_deploy import LoRAConfig, PrefixConfig\n"
        "print(LoRAConfig(r=3).r, PrefixConfig(num_prefix_tokens=5).num_prefix_tokens)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["3", "5"]
