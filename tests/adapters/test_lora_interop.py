"""Adapters move between this package and the installed paddlenlp.peft, both ways."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import paddle
import pytest
from adapters_tiny import fill_branches, logits, tiny_llama, tiny_model
from paddlenlp import peft as reference
from paddlenlp.trl.llm_utils import get_lora_target_modules

from peft_deploy.adapters import lora as ours

SIDES = {"reference": reference, "ours": ours}
DIRECTIONS = [("reference", "ours"), ("ours", "reference"), ("ours", "ours")]
CASES = {
    "llama": ("llama", {"target_modules": [".*q_proj.*", ".*v_proj.*", ".*mlp.*_proj"]}),
    "qwen2": ("qwen2", {"target_modules": ".*_proj"}),
    "gpt": ("gpt", {"target_modules": [".*qkv_proj.*|.*q_proj.*", ".*linear1.*"]}),
    "bloom": ("bloom", {"target_modules": [".*query_key_value.*", ".*dense_4h_to_h.*"]}),
    "bert": ("bert", {"target_modules": [".*q_proj.*", ".*v_proj.*"]}),
    "rslora": ("llama", {"target_modules": [".*q_proj.*"], "rslora": True}),
    "dropout": ("llama", {"target_modules": [".*q_proj.*"], "lora_dropout": 0.3}),
    "lora biases": ("qwen2", {"target_modules": [".*q_proj.*"], "trainable_bias": "lora"}),
    "all biases": ("bert", {"target_modules": [".*q_proj.*"], "trainable_bias": "all"}),
    "modules": (
        "llama",
        {"target_modules": [".*q_proj.*"], "trainable_modules": [".*norm.*", "lm_head.weight"]},
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("writer", "reader"), DIRECTIONS)
@pytest.mark.parametrize("case", CASES)
def test_an_adapter_moves(case: str, writer: str, reader: str, tmp_path: Path) -> None:
    family, options = CASES[case]
    config = SIDES[writer].LoRAConfig(r=4, lora_alpha=6, **options)
    model = SIDES[writer].LoRAModel(tiny_model(family), config)
    fill_branches(model)
    model.eval()
    tuned, before = logits(model), logits(tiny_model(family))
    assert np.abs(tuned - before).max() > 0.05
    model.save_pretrained(str(tmp_path))
    loaded = SIDES[reader].LoRAModel.from_pretrained(tiny_model(family), str(tmp_path))
    loaded.eval()
    np.testing.assert_allclose(logits(loaded), tuned, rtol=1e-5, atol=1e-5)
    loaded.merge()
    np.testing.assert_allclose(logits(loaded), tuned, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_the_files_are_the_same_on_both_sides(tmp_path: Path) -> None:
    for side, package in SIDES.items():
        config = package.LoRAConfig(
            target_modules=[".*q_proj.*"], r=4, lora_alpha=6, trainable_bias="lora"
        )
        model = package.LoRAModel(tiny_model("qwen2"), config)
        fill_branches(model)
        model.save_pretrained(str(tmp_path / side))
    first, second = tmp_path / "reference", tmp_path / "ours"
    for name in ("lora_config.json", "config.json"):
        assert (first / name).read_text() == (second / name).read_text()
    states = [paddle.load(str(f / "lora_model_state.pdparams")) for f in (first, second)]
    assert list(states[0]) == list(states[1])
    for name, tensor in states[0].items():
        np.testing.assert_array_equal(states[1][name].numpy(), tensor.numpy())
    assert {path.name for path in second.iterdir()} - {path.name for path in first.iterdir()} == {
        "peft_deploy_adapter.json"
    }


@pytest.mark.filterwarnings("ignore")
def test_l7_an_adapter_that_the_reference_trained_with_pissa(tmp_path: Path) -> None:
    config = reference.LoRAConfig(target_modules=[".*q_proj.*"], r=4, pissa=True)
    model = reference.LoRAModel(tiny_llama(), config)
    model.eval()
    start = logits(model)  # the reference splits the weights at the first run
    generator = np.random.default_rng(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            noise = generator.standard_normal(parameter.shape).astype("float32")
            parameter.set_value(parameter + paddle.to_tensor(noise))
    tuned = logits(model)
    assert np.abs(tuned - start).max() > 0.1
    model.save_pretrained(str(tmp_path))
    loaded = ours.LoRAModel.from_pretrained(tiny_llama(), tmp_path)
    np.testing.assert_allclose(logits(loaded), tuned, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_bfloat16_files_of_the_reference(tmp_path: Path) -> None:
    base = tiny_llama()
    config = reference.LoRAConfig(target_modules=[".*q_proj.*"], r=4, dtype="bfloat16")
    model = reference.LoRAModel(base, config)
    fill_branches(model)
    model.save_pretrained(str(tmp_path))
    expected = {
        n: t.astype("float32").numpy() for n, t in model.get_trainable_state_dict().items()
    }
    loaded = ours.LoRAModel.from_pretrained(tiny_llama(), tmp_path)
    for name, tensor in loaded.get_trainable_state_dict().items():
        np.testing.assert_array_equal(tensor.astype("float32").numpy(), expected[name])


@pytest.mark.filterwarnings("ignore:target_modules.*matches none")
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt", "bloom"])
def test_paddlenlp_s_own_patterns_for_a_family(family: str) -> None:
    base = tiny_model(family)
    patterns = get_lora_target_modules(base)
    model = ours.LoRAModel(base, ours.LoRAConfig(target_modules=patterns, r=2))
    theirs = reference.LoRAModel(
        tiny_model(family), reference.LoRAConfig(target_modules=patterns, r=2)
    )
    assert list(model.get_trainable_state_dict()) == list(theirs.get_trainable_state_dict())


def test_an_adapter_with_patterns_that_match_nothing_loads_without_a_word(tmp_path: Path) -> None:
    config = ours.LoRAConfig(target_modules=[".*q_proj.*"], r=2)
    ours.LoRAModel(tiny_llama(), config).save_pretrained(tmp_path)
    path = tmp_path / "lora_config.json"
    options = json.loads(path.read_text())
    options["target_modules"].append(".*qkv_proj.*")
    path.write_text(json.dumps(options))
    ours.LoRAModel.from_pretrained(tiny_llama(), tmp_path)  # warnings are errors here


def test_the_file_is_a_plain_pickle_of_arrays(tmp_path: Path) -> None:
    model = ours.LoRAModel(tiny_llama(), ours.LoRAConfig(target_modules=["q_proj"], r=2))
    model.save_pretrained(tmp_path)
    state = pickle.loads((tmp_path / "lora_model_state.pdparams").read_bytes())  # noqa: TID251
    assert type(state) is dict
    assert all(type(value) is np.ndarray for value in state.values())
