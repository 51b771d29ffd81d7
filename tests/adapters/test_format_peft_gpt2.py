"""PEFT folders of GPT-2, whose Conv1D layers are [in, out] in torch, too, and whose c_attn holds three layers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from peft_made import PREFIX, delta, write
from safetensors.numpy import load_file

from peft_deploy.adapters.formats.detect import read_lora
from peft_deploy.adapters.formats.peft_writer import write_peft
from peft_deploy.errors import AdapterError
from peft_deploy.families import find_family
from peft_deploy.weights import lora_delta

HIDDEN, RANK, LAYERS, ALPHA = 8, 3, 2, 7
FAMILY = find_family({"architectures": ["GPT2LMHeadModel"]})
NAMES = FAMILY.names({})
SIZES = {  # [in, out]
    "attn.c_attn": (HIDDEN, 3 * HIDDEN),
    "attn.c_proj": (HIDDEN, HIDDEN),
    "mlp.c_fc": (HIDDEN, 12),
    "mlp.c_proj": (12, HIDDEN),
}


def tensors(*parts: str, seed: int = 4) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    made = {}
    for i in range(LAYERS):
        for part in parts:
            inner, out = SIZES[part]
            name = f"{PREFIX}transformer.h.{i}.{part}"
            made[f"{name}.lora_A.weight"] = generator.standard_normal((RANK, inner))
            made[f"{name}.lora_B.weight"] = generator.uniform(0.5, 1.5, (out, RANK))
    return {name: array.astype(np.float32) for name, array in made.items()}


def folder(path: Path, *parts: str, **options: object) -> Path:
    targets = sorted({part.rpartition(".")[2] for part in parts})
    given = {"fan_in_fan_out": True, "target_modules": targets, **options}
    return write(path, tensors(*parts), r=RANK, lora_alpha=ALPHA, **given)


def test_each_part_of_a_fused_layer_gets_its_columns(tmp_path: Path) -> None:
    adapter = read_lora(folder(tmp_path / "hf", *SIZES), NAMES, num_layers=LAYERS)
    kept = {"attn.c_proj": "self_attn.out_proj", "mlp.c_fc": "linear1", "mlp.c_proj": "linear2"}
    parts = ("q_proj", "k_proj", "v_proj")
    assert adapter.pairs.keys() == {
        f"gpt.decoder.layers.{i}.{name}"
        for i in range(LAYERS)
        for name in (*kept.values(), *(f"self_attn.{part}" for part in parts))
    }
    for i in range(LAYERS):
        root = f"gpt.decoder.layers.{i}."
        for theirs, ours in kept.items():
            wanted = delta(tensors(*SIZES), f"transformer.h.{i}.{theirs}", ALPHA / RANK)
            np.testing.assert_allclose(lora_delta(adapter.pairs[root + ours]), wanted, rtol=1e-4)
        whole = delta(tensors(*SIZES), f"transformer.h.{i}.attn.c_attn", ALPHA / RANK)
        found = [lora_delta(adapter.pairs[f"{root}self_attn.{part}"]) for part in parts]
        np.testing.assert_allclose(np.concatenate(found, axis=1), whole, rtol=1e-4)
        assert np.abs(found[0] - found[1]).max() > 0.1


def test_the_layers_that_it_shares_with_paddlenlp_go_back(tmp_path: Path) -> None:
    first = folder(tmp_path / "hf", "mlp.c_fc")
    adapter = read_lora(first, NAMES, num_layers=LAYERS)
    write_peft(tmp_path / "back", adapter, NAMES, num_layers=LAYERS)
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True
    assert config["target_modules"] == ["c_fc"]
    back = load_file(tmp_path / "back" / "adapter_model.safetensors")
    wanted = load_file(first / "adapter_model.safetensors")
    assert back.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(back[name], array)


def test_parts_of_a_fused_layer_have_no_layer_to_go_back_to(tmp_path: Path) -> None:
    adapter = read_lora(folder(tmp_path / "hf", "attn.c_attn"), NAMES, num_layers=LAYERS)
    with pytest.raises(AdapterError, match=r"fuse or split(.|\n)*self_attn\.q_proj"):
        write_peft(tmp_path / "back", adapter, NAMES, num_layers=LAYERS)
    assert not (tmp_path / "back").exists()


def test_a_layer_that_the_file_lacks_is_missed(tmp_path: Path) -> None:
    broken = folder(tmp_path / "hf", "mlp.c_fc", target_modules=["c_fc", "c_attn"])
    with pytest.raises(AdapterError, match=r"does not hold(.|\n)*h\.1\.attn\.c_attn"):
        read_lora(broken, NAMES, num_layers=LAYERS)
