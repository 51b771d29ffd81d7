"""Which of the three it is, told by the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from made_things import lora_tensors, write_bundle, write_lora

from peft_deploy.errors import AdapterError, CheckpointError
from peft_deploy.inspection import Kind, inspect, kind_of


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_lora(tmp_path / "model", lora_tensors())  # the name says nothing


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "adapter")


def test_folders(tiny_llama: Path, adapter: Path, bundle: Path) -> None:
    assert kind_of(tiny_llama) == (Kind.CHECKPOINT, tiny_llama)
    assert kind_of(adapter) == (Kind.ADAPTER, adapter)
    assert kind_of(bundle) == (Kind.BUNDLE, bundle)  # though it has a config.json, too


@pytest.mark.parametrize("name", ["peft_deploy.json", "model.onnx"])
def test_a_file_of_a_bundle_means_the_bundle(bundle: Path, name: str) -> None:
    assert kind_of(bundle / name) == (Kind.BUNDLE, bundle)


@pytest.mark.parametrize("name", ["lora_config.json", "lora_model_state.pdparams"])
def test_a_file_of_an_adapter_means_the_adapter(adapter: Path, name: str) -> None:
    assert kind_of(adapter / name) == (Kind.ADAPTER, adapter)


def test_a_file_of_weights_stands_for_itself(tiny_llama: Path) -> None:
    file = tiny_llama / "model.safetensors"
    assert kind_of(file) == (Kind.CHECKPOINT, file)
    assert kind_of(tiny_llama / "config.json") == (Kind.CHECKPOINT, tiny_llama)


def test_a_trainer_output_with_the_base_config_is_an_adapter(adapter: Path) -> None:
    (adapter / "config.json").write_text("{}", "utf-8")
    assert kind_of(adapter)[0] is Kind.ADAPTER


def test_none_of_the_three(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x", "utf-8")
    with pytest.raises(CheckpointError) as caught:
        inspect(tmp_path)
    for looked_for in ("peft_deploy.json", "lora_config.json", "config.json", "model.safetensors"):
        assert looked_for in caught.value.message
    assert "notes.txt" in caught.value.message
    assert caught.value.exit_code == 3


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="The folder is empty"):
        inspect(tmp_path)


def test_weights_of_another_name_are_pointed_at(tmp_path: Path) -> None:
    (tmp_path / "part.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        inspect(tmp_path)
    assert str(tmp_path / "part.safetensors") in str(caught.value.hint)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        inspect(tmp_path / "nothing")


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x", "utf-8")
    with pytest.raises(CheckpointError, match="neither a file of weights"):
        inspect(tmp_path / "notes.txt")


def test_a_foreign_adapter_gets_the_adapter_reader_to_say_so(tmp_path: Path) -> None:
    (tmp_path / "vera_config.json").write_text("{}", "utf-8")
    with pytest.raises(AdapterError, match="VeRA"):
        inspect(tmp_path)


def test_single_files_of_sharded_weights(make_tiny_llama: Callable[..., Path]) -> None:
    folder = make_tiny_llama(container="sharded-safetensors")
    whole = inspect(folder)
    parts = [inspect(file) for file in sorted(folder.glob("model-*.safetensors"))]
    assert sum(part.stored.parameters for part in parts) == whole.stored.parameters
    assert len(whole.files) == len(parts) == 3
