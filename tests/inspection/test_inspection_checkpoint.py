"""The facts about a base model's files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from peft_deploy.errors import CheckpointError
from peft_deploy.families import ModelDims
from peft_deploy.inspection import CheckpointInspection, inspect

Maker = Callable[..., Path]


def elements(module: ModuleType, **options: object) -> int:
    return sum(a.size for a in module.weights(module.config_of(**options)).values())


def test_the_facts(tiny_llama: Path, tiny_llama_module: ModuleType) -> None:
    found = inspect(tiny_llama)
    assert isinstance(found, CheckpointInspection)
    assert found.architectures == ("LlamaForCausalLM",)
    assert found.model_type == "llama"
    assert found.dims == ModelDims(
        num_layers=2,
        hidden_size=48,
        num_heads=6,
        num_kv_heads=2,
        head_dim=8,
        vocab_size=131,
        max_positions=256,
    )
    assert (found.container, found.layout, found.tied) == ("safetensors", "huggingface", False)
    assert found.stored == found.model
    assert found.stored.parameters == elements(tiny_llama_module)
    assert found.stored.dtypes == {"float32": found.stored.parameters}
    assert found.stored.bytes == 4 * found.stored.parameters
    (file,) = found.files
    assert file.name == "model.safetensors"
    assert file.bytes == (tiny_llama / file.name).stat().st_size
    assert "tokenizer.json" in found.companions
    assert found.unsupported is None


@pytest.mark.parametrize("container", ["safetensors", "sharded-safetensors"])
@pytest.mark.parametrize("layout", ["huggingface", "paddlenlp"])
def test_the_form_does_not_change_the_model(
    tiny_llama: Path, make_tiny_llama: Maker, container: str, layout: str
) -> None:
    known, found = (
        inspect(tiny_llama),
        inspect(make_tiny_llama(container=container, layout=layout)),
    )
    assert found.layout == layout
    assert (found.fingerprint, found.dims, found.model) == (
        known.fingerprint,
        known.dims,
        known.model,
    )


def test_other_weights_have_another_fingerprint(tiny_llama: Path, make_tiny_llama: Maker) -> None:
    assert inspect(tiny_llama).fingerprint != inspect(make_tiny_llama(seed=1)).fingerprint


def test_tied_and_half_precision(make_tiny_llama: Maker, tiny_llama_module: ModuleType) -> None:
    found = inspect(make_tiny_llama(tied=True, dtype="bfloat16"))
    assert found.tied is True
    assert found.stored.dtypes == {"bfloat16": elements(tiny_llama_module, tied=True)}
    assert found.stored.bytes == 2 * found.stored.parameters


def test_what_is_stored_twice_counts_once(make_tiny_llama: Maker, tmp_path: Path) -> None:
    untied = make_tiny_llama(layout="huggingface")
    folder = Path(shutil.copytree(untied, tmp_path / "copy"))
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    found = inspect(folder)
    assert found.stored.parameters - found.model.parameters == 131 * 48


def test_sharded_pdparams(make_tiny_llama: Maker, tiny_llama: Path) -> None:
    found = inspect(make_tiny_llama(container="sharded-pdparams", layout="paddlenlp"))
    assert found.container == "pdparams"
    assert found.fingerprint == inspect(tiny_llama).fingerprint


def test_a_lone_file(tiny_llama: Path) -> None:
    found = inspect(tiny_llama / "model.safetensors")
    assert found.layout == "huggingface"
    assert found.dims is None and found.fingerprint is None
    assert found.stored.tensors == 21


def test_a_family_that_nobody_registered(make_tiny_llama: Maker, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_tiny_llama(), tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config |= {"architectures": ["NobodyForCausalLM"], "model_type": "nobody"}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    found = inspect(folder)
    assert found.architectures == ("NobodyForCausalLM",)
    assert "NobodyForCausalLM" in str(found.unsupported)
    assert "LlamaForCausalLM" in str(found.unsupported)
    assert found.stored.tensors == 21
    assert found.dims is None and found.model is None


def test_a_truncated_file_is_the_readers_error(make_tiny_llama: Maker, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_tiny_llama(), tmp_path / "copy"))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        inspect(folder)


def test_a_config_without_weights(make_tiny_llama: Maker, tmp_path: Path) -> None:
    shutil.copy(make_tiny_llama() / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="holds no weights"):
        inspect(tmp_path)


def test_a_damaged_config(make_tiny_llama: Maker, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_tiny_llama(), tmp_path / "copy"))
    (folder / "config.json").write_text('{"architectures": ', "utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        inspect(folder)
