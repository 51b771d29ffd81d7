from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from weights_family import (
    ArrayTensors,
    paddle_weights,
    save_pdparams,
    save_safetensors,
    save_sharded,
)

from peft_deploy.errors import CheckpointError
from peft_deploy.weights import TensorSource, open_checkpoint

WEIGHTS = paddle_weights(dtype="bfloat16")


def store(folder: Path, kind: str) -> str:
    """Stores the weights in one of the four ways; returns the format."""
    match kind:
        case "safetensors":
            save_safetensors(folder / "model.safetensors", WEIGHTS)
        case "sharded safetensors":
            save_sharded(folder, WEIGHTS, save_safetensors)
        case "pdparams":
            save_pdparams(folder / "model_state.pdparams", WEIGHTS)
        case "sharded pdparams":
            save_sharded(folder, WEIGHTS, save_pdparams, "model_state", ".pdparams")
    return kind.split()[-1]


KINDS = ["safetensors", "sharded safetensors", "pdparams", "sharded pdparams"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_folder_holds_the_same_tensors(tmp_path: Path, kind: str) -> None:
    format = store(tmp_path, kind)
    checkpoint = open_checkpoint(tmp_path)
    assert isinstance(checkpoint, TensorSource)
    assert checkpoint.path == tmp_path
    assert checkpoint.format == format
    assert len(checkpoint.files) == (3 if "sharded" in kind else 1)
    assert set(checkpoint.names()) == set(WEIGHTS)
    assert checkpoint.metadata == ({"format": "pt"} if format == "safetensors" else {})
    for name, array in WEIGHTS.items():
        info = checkpoint.info(name)
        assert (info.name, info.dtype, info.shape) == (name, "bfloat16", array.shape)
        assert np.array_equal(checkpoint.read(name), array)


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_itself_can_be_named(tmp_path: Path, kind: str) -> None:
    store(tmp_path, kind)
    stem = "model" if "safetensors" in kind else "model_state"
    end = ".index.json" if "sharded" in kind else ""
    file = tmp_path / f"{stem}.{kind.split()[-1]}{end}"
    assert np.array_equal(open_checkpoint(file).read("lm_head.weight"), WEIGHTS["lm_head.weight"])


def test_a_single_file_under_any_name(tmp_path: Path) -> None:
    save_pdparams(tmp_path / "lora_model_state.pdparams", WEIGHTS)
    assert set(open_checkpoint(tmp_path / "lora_model_state.pdparams").names()) == set(WEIGHTS)


def test_an_unknown_name_is_a_key_error(tmp_path: Path) -> None:
    store(tmp_path, "safetensors")
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(KeyError):
        checkpoint.info("nobody")
    with pytest.raises(KeyError):
        checkpoint.read("nobody")


def test_a_folder_without_weights_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    for part in ("model.safetensors", "model_state.pdparams", "The folder holds:\n  config.json"):
        assert part in caught.value.message
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("model_state.tp00.pdparams", "tensor-parallel"),
        ("pytorch_model.bin", "safe_serialization"),
        ("adapter_model.safetensors", "name the file"),
    ],
)
def test_a_folder_with_something_like_weights_gets_a_hint(
    tmp_path: Path, name: str, hint: str
) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert hint in str(caught.value.hint)


def test_an_empty_folder_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="The folder is empty"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere")


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"has to end in \.safetensors or \.pdparams"):
        open_checkpoint(tmp_path / "model.gguf")


@pytest.mark.parametrize("other", ["sharded safetensors", "pdparams", "sharded pdparams"])
def test_two_sets_of_weights_in_one_folder_are_refused(tmp_path: Path, other: str) -> None:
    store(tmp_path, "safetensors")
    store(tmp_path, other)
    with pytest.raises(CheckpointError, match="more than one set of weights") as caught:
        open_checkpoint(tmp_path)
    assert "  model.safetensors\n" in caught.value.message
    assert set(open_checkpoint(tmp_path / "model.safetensors").names()) == set(WEIGHTS)


def test_an_index_of_the_plain_file_is_no_second_set(tmp_path: Path) -> None:
    store(tmp_path, "safetensors")
    weight_map = dict.fromkeys(WEIGHTS, "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert set(open_checkpoint(tmp_path).names()) == set(WEIGHTS)


def edit_index(folder: Path, change: dict[str, str | None]) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for name, shard in change.items():
        if shard is None:
            del content["weight_map"][name]
        else:
            content["weight_map"][name] = shard
    index.write_text(json.dumps(content))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    store(tmp_path, "sharded safetensors")
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"shards that are not there:\n  model-00002-of-00003"
    ):
        open_checkpoint(tmp_path)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path: Path) -> None:
    store(tmp_path, "sharded safetensors")
    edit_index(tmp_path, {"more.weight": "model-00001-of-00003.safetensors"})
    with pytest.raises(CheckpointError, match=r"their shard lacks:\n  more.weight in model-00001"):
        open_checkpoint(tmp_path)


def test_a_tensor_in_another_shard_than_the_index_says_is_named(tmp_path: Path) -> None:
    store(tmp_path, "sharded safetensors")
    first = next(iter(WEIGHTS))
    edit_index(tmp_path, {first: "model-00002-of-00003.safetensors"})
    with pytest.raises(CheckpointError, match=rf"their shard lacks:\n  {first} in model-00002"):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    store(tmp_path, "sharded safetensors")
    name = next(iter(WEIGHTS))
    third = dict(list(WEIGHTS.items())[2::3]) | {name: WEIGHTS[name]}
    save_safetensors(tmp_path / "model-00003-of-00003.safetensors", third)
    with pytest.raises(
        CheckpointError, match=r"two shards hold:\n  .* in model-00001.* and model-0"
    ):
        open_checkpoint(tmp_path)


def test_a_tensor_that_the_index_forgets_is_named(tmp_path: Path) -> None:
    store(tmp_path, "sharded safetensors")
    edit_index(tmp_path, {"lm_head.weight": None})
    with pytest.raises(CheckpointError, match=r"does not name .*:\n  lm_head.weight"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/x.safetensors", "a/../../x", "..\\x", "", 3]
)
def test_a_shard_outside_the_folder_is_refused(tmp_path: Path, shard: str) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    save_safetensors(tmp_path / "model.safetensors", WEIGHTS)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(WEIGHTS, shard)})
    )
    with pytest.raises(CheckpointError, match="not a file of this folder"):
        open_checkpoint(folder)


def test_a_shard_may_be_a_link_into_a_download_cache(tmp_path: Path) -> None:
    folder = tmp_path / "snapshot"
    folder.mkdir()
    save_safetensors(tmp_path / "blob", WEIGHTS)
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    assert set(open_checkpoint(folder).names()) == set(WEIGHTS)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_a_damaged_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json (is not a JSON|has no weight_map)"):
        open_checkpoint(tmp_path)


def test_a_damaged_shard_is_found_before_anything_is_read(tmp_path: Path) -> None:
    store(tmp_path, "sharded safetensors")
    shard = tmp_path / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model-00003-of-00003\.safetensors is cut short"):
        open_checkpoint(tmp_path)


def test_a_file_without_tensors(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "model.safetensors", {})
    with pytest.raises(CheckpointError, match="holds no tensor"):
        open_checkpoint(tmp_path)


def test_weights_do_not_import_paddle() -> None:
    code = "import sys, peft_deploy.weights; sys.exit('paddle' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_tests_own_source_is_a_source() -> None:
    assert isinstance(ArrayTensors({}), TensorSource)
