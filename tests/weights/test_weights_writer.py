from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from weights_family import ArrayTensors, paddle_weights, to_huggingface

from peft_deploy.errors import OutputError
from peft_deploy.weights import DTYPES, Array, TensorInfo, open_checkpoint, write_safetensors
from peft_deploy.weights.safetensors_file import SafetensorsFile

WEIGHTS = paddle_weights(dtype="bfloat16")


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6),
    dtypes=st.data(),
)
def test_files_are_those_of_the_library(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], dtypes: st.DataObject
) -> None:
    """Byte for byte: the same order, offsets and padding."""
    folder = tmp_path_factory.mktemp("written")
    rng = np.random.default_rng(len(shapes))
    arrays: dict[str, Array] = {}
    for i, shape in enumerate(shapes):
        dtype = dtypes.draw(st.sampled_from(sorted(DTYPES)))
        values = np.asarray(rng.standard_normal(shape) * 100)
        arrays[f"layers.{9 - i}.wé"] = values.astype(DTYPES[dtype])
    write_safetensors(folder / "ours.safetensors", ArrayTensors(arrays), {"format": "pt"})
    save_file(arrays, folder / "theirs.safetensors", metadata={"format": "pt"})
    ours = (folder / "ours.safetensors").read_bytes()
    assert ours == (folder / "theirs.safetensors").read_bytes()
    file = SafetensorsFile(folder / "ours.safetensors")
    for name, array in arrays.items():
        assert file.read(name).dtype == array.dtype
        assert file.read(name).shape == array.shape
        assert file.read(name).tobytes() == array.tobytes()


def test_without_metadata(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    assert write_safetensors(path, ArrayTensors({"a": np.ones(3)})) == (path,)
    save_file({"a": np.ones(3)}, tmp_path / "y.safetensors")
    assert path.read_bytes() == (tmp_path / "y.safetensors").read_bytes()


def test_metadata_of_several_entries_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    metadata = {"format": "pt", "made by": "a “test”\n"}
    write_safetensors(path, ArrayTensors(WEIGHTS), metadata)
    with safe_open(path, "numpy") as file:
        assert file.metadata() == metadata


def test_transposed_views_are_written_in_row_major_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "matrix": rng.standard_normal((700, 900)).astype(np.float32).T,
        "steps": np.arange(40, dtype=np.int64)[::2],
        "cube": rng.standard_normal((4, 5, 6)).transpose(2, 0, 1),
        "wide": rng.standard_normal((3, 2_000_000)).astype(np.float32).T,  # several blocks
    }
    write_safetensors(tmp_path / "x.safetensors", ArrayTensors(arrays))
    read = load_file(tmp_path / "x.safetensors")
    for name, array in arrays.items():
        assert np.array_equal(read[name], array)


@pytest.mark.parametrize("limit", [1, 700, 1500, 2500])
def test_shards_hold_the_same_as_one_file(tmp_path: Path, limit: int) -> None:
    written = write_safetensors(
        tmp_path / "model.safetensors", ArrayTensors(WEIGHTS), {"format": "np"}, limit
    )
    *shards, index = written
    assert index.name == "model.safetensors.index.json"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in written)
    content = json.loads(index.read_text())
    assert content["metadata"]["total_size"] == sum(a.nbytes for a in WEIGHTS.values())
    names: list[str] = []
    for i, shard in enumerate(shards):
        assert shard.name == f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        held = load_file(shard)
        names += held
        assert len(held) == 1 or sum(a.nbytes for a in held.values()) <= limit
    assert sorted(names) == sorted(WEIGHTS)
    checkpoint = open_checkpoint(tmp_path)
    assert len(checkpoint.files) == len(shards) > 1
    for name, array in WEIGHTS.items():
        assert np.array_equal(checkpoint.read(name), array)


def test_what_fits_one_file_gets_no_index(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    assert write_safetensors(path, ArrayTensors(WEIGHTS), {}, 1 << 30) == (path,)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


class Failing(ArrayTensors):
    """Fails at one tensor."""

    def __init__(self, arrays: dict[str, Array], at: str, error: BaseException) -> None:
        super().__init__(arrays)
        self._at, self._error = at, error

    def read(self, name: str) -> Array:
        if name == self._at:
            raise self._error
        return super().read(name)


@pytest.mark.parametrize("limit", [None, 1000])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("no")])
def test_a_failure_leaves_what_was_there(
    tmp_path: Path, limit: int | None, error: BaseException
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    source = Failing(WEIGHTS, "toy.layers.1.norm.weight", error)
    with pytest.raises(type(error)):
        write_safetensors(path, source, {}, limit)
    assert len(source.reads) > 3
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_full_disk_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import peft_deploy.weights.writer as writer

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "_write_file", full)
    with pytest.raises(OutputError, match=r"x\.safetensors cannot be written: No space") as caught:
        write_safetensors(tmp_path / "x.safetensors", ArrayTensors(WEIGHTS))
    assert "free some space" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file or directory"):
        write_safetensors(tmp_path / "no" / "x.safetensors", ArrayTensors(WEIGHTS))


def test_a_source_that_breaks_its_word_is_refused(tmp_path: Path) -> None:
    class Lying(ArrayTensors):
        def info(self, name: str) -> TensorInfo:
            return TensorInfo(name, "float32", super().info(name).shape)

    from peft_deploy.errors import CheckpointError

    with pytest.raises(CheckpointError, match=r"announced as float32 .* read as bfloat16"):
        write_safetensors(tmp_path / "x.safetensors", Lying(WEIGHTS))
    assert list(tmp_path.iterdir()) == []


def test_one_tensor_is_held_at_a_time(tmp_path: Path) -> None:
    import tracemalloc

    each = 1 << 20

    class Making(ArrayTensors):
        def read(self, name: str) -> Array:
            return np.full((512, each // 2048), 1.5, np.float32)

    infos = {f"w{i}": np.broadcast_to(np.float32(0), (512, each // 2048)) for i in range(30)}
    tracemalloc.start()
    try:
        write_safetensors(tmp_path / "x.safetensors", Making(infos))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2.5 * each
    assert (tmp_path / "x.safetensors").stat().st_size > 30 * each


def test_a_torch_checkpoint_round_trips(tmp_path: Path) -> None:
    stored = to_huggingface(WEIGHTS)
    write_safetensors(tmp_path / "model.safetensors", ArrayTensors(stored), {"format": "pt"})
    read = load_file(tmp_path / "model.safetensors")
    assert all(np.array_equal(read[name], array) for name, array in stored.items())
