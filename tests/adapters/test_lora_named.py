from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from adapters_tiny import bits, fill_branches, logits, tiny_llama

from peft_deploy.adapters.lora import LoRAConfig, LoRAModel
from peft_deploy.errors import AdapterError

ADAPTERS = {
    "small": {"target_modules": ["q_proj"], "r": 2, "lora_alpha": 4},
    "wide": {"target_modules": ["q_proj", "up_proj"], "r": 8, "lora_alpha": 4, "rslora": True},
    "whole": {
        "target_modules": ["v_proj"],
        "r": 3,
        "trainable_modules": ["llama.norm", "lm_head"],
    },
    "principal": {"target_modules": ["q_proj", "o_proj"], "r": 4, "pissa": True},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        model = LoRAModel(tiny_llama(), LoRAConfig(**options))
        fill_branches(model, seed)
        model.save_pretrained(root / name)
    return {name: root / name for name in ADAPTERS}


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> dict[str, np.ndarray]:
    """What each adapter computes by itself."""
    outputs = {n: logits(LoRAModel.from_pretrained(tiny_llama(), f)) for n, f in folders.items()}
    base = logits(tiny_llama())
    assert all(np.abs(output - base).max() > 0.1 for output in outputs.values())
    return outputs


def load_all(folders: dict[str, Path]) -> LoRAModel:
    model = LoRAModel.from_pretrained(tiny_llama(), folders["small"])
    for name in list(folders)[1:]:
        model.load_adapter(folders[name], name)
    return model


def test_loading_does_not_activate(folders, alone) -> None:
    model = load_all(folders)
    assert model.adapters == ["default", "wide", "whole", "principal"]
    assert model.active_adapter == "default"
    np.testing.assert_array_equal(logits(model), alone["small"])


@pytest.mark.parametrize("merged", [False, True])
def test_switching_between_adapters(folders, alone, merged: bool) -> None:
    model = load_all(folders)
    for name in ["wide", "whole", "principal", "wide", "default", "principal", "whole", "default"]:
        model.set_adapter(name)
        assert model.active_adapter == name
        assert not model.merged
        own = alone["small" if name == "default" else name]
        np.testing.assert_array_equal(logits(model), own)
        if merged:
            model.merge()
            np.testing.assert_allclose(logits(model), own, atol=1e-5)


def test_the_base_comes_back_to_the_bit_after_switching(folders) -> None:
    model = load_all(folders)
    expected = bits(tiny_llama())
    for name in ["whole", "principal", "wide"]:
        model.set_adapter(name)
        model.merge()
    assert bits(model.restore_original_model()) == expected


def test_loading_keeps_the_state(folders, alone) -> None:
    model = LoRAModel.from_pretrained(tiny_llama(), folders["principal"])
    model.merge()
    model.load_adapter(folders["whole"], "whole")
    assert model.merged
    np.testing.assert_allclose(logits(model), alone["principal"], atol=1e-5)
    model.disable_lora()
    model.load_adapter(folders["wide"], "wide")
    np.testing.assert_array_equal(logits(model), logits(tiny_llama()))
    model.set_adapter("whole")
    np.testing.assert_array_equal(logits(model), logits(tiny_llama()))
    model.enable_lora()
    np.testing.assert_array_equal(logits(model), alone["whole"])


def test_saving_writes_the_active_one(folders, alone, tmp_path: Path) -> None:
    model = load_all(folders)
    model.set_adapter("whole")
    model.save_pretrained(tmp_path)
    loaded = LoRAModel.from_pretrained(tiny_llama(), tmp_path)
    np.testing.assert_array_equal(logits(loaded), alone["whole"])
    assert loaded.lora_config.r == 3


def test_only_the_active_one_is_trained(folders) -> None:
    model = load_all(folders)
    model.set_adapter("whole")
    trained = {n for n, p in model.model.named_parameters() if not p.stop_gradient}
    assert trained == set(model.get_trainable_state_dict())
    assert "lm_head.weight" in trained
    model.set_adapter("wide")
    assert model.model.lm_head.weight.stop_gradient


def test_deleting(folders, alone) -> None:
    model = load_all(folders)
    model.delete_adapter("wide")
    assert "wide" not in model.adapters
    with pytest.raises(AdapterError, match="no adapter 'wide'"):
        model.set_adapter("wide")
    with pytest.raises(AdapterError, match="no adapter 'wide'"):
        model.delete_adapter("wide")
    with pytest.raises(AdapterError, match="is active"):
        model.delete_adapter("default")
    np.testing.assert_array_equal(logits(model), alone["small"])


def test_a_name_that_is_taken(folders) -> None:
    model = load_all(folders)
    with pytest.raises(AdapterError, match="already"):
        model.load_adapter(folders["small"], "default")


def test_a_failed_load_changes_nothing(folders, alone, tmp_path: Path) -> None:
    model = load_all(folders)
    LoRAConfig(target_modules=["v_proj"], r=3).save_pretrained(tmp_path)
    (tmp_path / "lora_model_state.pdparams").write_bytes(
        (folders["small"] / "lora_model_state.pdparams").read_bytes()
    )
    with pytest.raises(AdapterError, match="r = 3"):
        model.load_adapter(tmp_path, "bad")
    assert "bad" not in model.adapters
    np.testing.assert_array_equal(logits(model), alone["small"])
