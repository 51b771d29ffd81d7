"""PEFT folders and ``.onnx_adapter`` files, exported and merged without being converted first."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import peft_deploy
from peft_deploy.base import open_base
from peft_deploy.workflows.convert_adapter import convert_adapter
from peft_deploy.workflows.merge import merge
from peft_deploy.workflows.validate import validate

PREFIX = "base_model.model."
V, LORA = "v_proj", (".lora_A.weight", ".lora_B.weight")


@pytest.fixture
def mixed(tiny_llama: Path, tiny_adapter: Path, tmp_path: Path) -> Path:
    """A PEFT folder with two ranks, three scalings and a head of its own."""
    folder = tmp_path / "mixed"
    convert_adapter(tiny_adapter, folder, to="hf", base=tiny_llama)
    file, config_file = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(file)
    for name, array in tensors.items():
        if V in name:
            tensors[name] = np.ascontiguousarray(array[:3] if LORA[0] in name else array[:, :3])
    head = open_base(tiny_llama).tensors.read("lm_head.weight").T
    tensors[f"{PREFIX}lm_head.weight"] = np.ascontiguousarray(head * np.float32(1.5))
    save_file(tensors, file, {"format": "pt"})
    config = json.loads(config_file.read_text())
    config |= {"rank_pattern": {V: 3}, "alpha_pattern": {"down_proj": 7}}
    config |= {"modules_to_save": ["lm_head"]}
    config_file.write_text(json.dumps(config))
    return folder


def test_merged_weights(tiny_llama: Path, mixed: Path, tmp_path: Path) -> None:
    merge(tiny_llama, mixed, tmp_path / "merged")
    adapter = load_file(mixed / "adapter_model.safetensors")
    before, after = (
        load_file(folder / "model.safetensors") for folder in (tiny_llama, tmp_path / "merged")
    )
    changed = 0
    for name, weight in before.items():
        wanted = weight.astype(np.float64)
        module = name.removesuffix(".weight")
        A, B = (adapter.get(f"{PREFIX}{module}{half}") for half in LORA)
        if A is not None and B is not None:
            alpha = (
                7 if "down_proj" in name else 10
            )  # of the folder of the fixture: twice its rank
            wanted = wanted + alpha / A.shape[0] * (B.astype(np.float64) @ A)
            changed += 1
        if name == "lm_head.weight":
            wanted = wanted * 1.5
        np.testing.assert_allclose(after[name], wanted, rtol=2e-6, atol=2e-6, err_msg=name)
    assert changed == 14


@pytest.mark.convert
def test_a_bundle_of_a_peft_folder(
    tiny_llama: Path, tiny_adapter: Path, mixed: Path, tmp_path: Path
) -> None:
    result = peft_deploy.export(tiny_llama, tmp_path / "bundle", adapter=mixed)
    assert result.parity is not None
    assert result.parity.passed, result.parity.summary()
    assert result.parity.effect is not None
    assert result.parity.effect.sensitivity < 1e-3
    with pytest.raises(peft_deploy.errors.AdapterError):  # another adapter than the bundle holds
        validate(tmp_path / "bundle", tiny_llama, adapter=tiny_adapter)


def test_a_file_of_onnxruntime_is_the_same_adapter(
    tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    file = tmp_path / "tuned.onnx_adapter"
    convert_adapter(tiny_adapter, file, to="onnx", base=tiny_llama)
    merge(tiny_llama, file, tmp_path / "a")
    merge(tiny_llama, tiny_adapter, tmp_path / "b")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    base = load_file(tiny_llama / "model.safetensors")
    for name, array in first.items():
        np.testing.assert_allclose(array, second[name], rtol=1e-6, atol=1e-6, err_msg=name)
    assert sum(not np.array_equal(first[n], base[n]) for n in first) == 14
