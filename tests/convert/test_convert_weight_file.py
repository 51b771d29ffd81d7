from __future__ import annotations

import errno
import hashlib
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from peft_deploy.convert import WeightFile, stream_weights
from peft_deploy.convert.bind import place
from peft_deploy.errors import CheckpointError, OutputError
from peft_deploy.parity.stored_weights import difference, stored_in_onnx
from peft_deploy.progress import Silent
from peft_deploy.runtime import OnnxRunner
from peft_deploy.weights import Array, TensorInfo
from peft_deploy.weights.pieces import Task, along, pieces_of_array


class Tensors:
    """Random matrices; those named in ``cut`` give fewer rows than they announce."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], cut: frozenset[str] = frozenset()):
        rng = np.random.default_rng(0)
        self.arrays = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
        self._cut = cut

    def names(self) -> Sequence[str]:
        return list(self.arrays)

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(name, "float32", self.arrays[name].shape)

    def read(self, name: str) -> Array:
        return self.arrays[name]

    def pieces(self, name: str, axis: int = 0, height: int | None = None) -> Iterator[Task[Array]]:
        array = self.arrays[name][:-1] if name in self._cut else self.arrays[name]
        return along(axis, partial(pieces_of_array, height=height), array)


SHAPES = {"layers.10.w": (3000, 1000), "layers.2.w": (7, 3), "b": (5,), "scalar": (), "no": (0, 2)}


def test_every_tensor_lies_where_the_file_says_and_the_hash_is_that_of_the_file(
    tmp_path: Path,
) -> None:
    tensors = Tensors(SHAPES)
    with WeightFile(tmp_path / "data") as file:
        stream_weights(tensors, file, Silent())
        file.add("table", np.arange(4))
    data = (tmp_path / "data").read_bytes()
    assert file.sha256 == hashlib.sha256(data).hexdigest()
    assert list(file.placements) == ["b", "layers.2.w", "layers.10.w", "no", "scalar", "table"]
    for name, array in tensors.arrays.items():
        place = file.placements[name]
        assert data[place.offset : place.offset + place.length] == array.tobytes()
        assert place.shape == array.shape and place.offset % 64 == 0


def test_a_tensor_that_is_not_what_was_announced_is_an_error(tmp_path: Path) -> None:
    tensors = Tensors({"a": (40, 3), "b": (6, 50)}, frozenset({"a"}))
    with (
        WeightFile(tmp_path / "data") as file,
        pytest.raises(
            CheckpointError, match=r"a was announced as float32 \[40, 3\]; with 12 bytes"
        ),
    ):
        stream_weights(tensors, file, Silent())


@pytest.mark.parametrize("pieces", [1, 20])
def test_a_full_disk_is_an_error_however_late_it_is_met(pieces: int, tmp_path: Path) -> None:
    """Of the last piece, and of one after which others come: writing runs behind."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        pytest.raises(OutputError, match=r"no space left for .*model"),
        WeightFile(tmp_path / "model.onnx.data", tmp_path / "model") as file,
    ):
        file._writing._take = full
        for i in range(pieces):
            file.add(f"w{i}", np.ones(4, np.float32))
    assert not [t for t in threading.enumerate() if t.name.startswith("peft-deploy-write")]


def test_an_array_may_be_used_again_once_it_is_added(tmp_path: Path) -> None:
    array = np.empty(1 << 21, np.float32)
    with WeightFile(tmp_path / "model.onnx.data") as file:
        for i in range(3):
            array[:] = i
            file.add(f"w{i}", array)
    data = (tmp_path / "model.onnx.data").read_bytes()
    assert np.frombuffer(data, np.float32)[:: 1 << 21].tolist() == [0, 1, 2]
    assert file.sha256 == hashlib.sha256(data).hexdigest()


def test_a_large_file_is_the_same_past_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = Tensors({"a": (700, 900), "b": (5,), "c": (3, 40_000)})
    for name, nbytes in (("small", 0), ("large", 1 << 20)):
        monkeypatch.setattr("peft_deploy.weights.large_file.available_memory", lambda: 1 << 20)
        with WeightFile(tmp_path / name, nbytes=nbytes) as file:
            stream_weights(tensors, file, Silent())
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == file.sha256
    assert (tmp_path / "small").read_bytes() == (tmp_path / "large").read_bytes()


class FileWithHole(WeightFile):
    """Can leave out bytes, which take no space on the disk."""

    def skip(self, size: int) -> None:
        self._writing.wait()
        self._file.seek(size, 1)
        self.end += size


def test_what_lies_beyond_four_gigabytes_is_found_by_onnxruntime_and_by_a_check(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(1)
    near, far = (rng.standard_normal((64, 64)).astype(np.float32) for _ in range(2))
    with FileWithHole(tmp_path / "model.onnx.data") as file:
        file.add("near", near)
        file.skip(5 << 30)
        file.add("far", far)
    assert file.placements["far"].offset > 1 << 32
    square = ir.TensorType(ir.DataType.FLOAT), ir.Shape([64, 64])
    x = ir.Value(name="x", type=square[0], shape=square[1])
    weights = [ir.Value(name=name) for name in ("near", "far")]
    nodes = []
    for value in weights:
        place(value, file.placements[str(value.name)], file)
        nodes.append(ir.node("MatMul", [nodes[-1].outputs[0] if nodes else x, value]))
    y = nodes[-1].outputs[0]
    y.name, y.type, y.shape = "y", *square
    graph = ir.Graph([x], [y], nodes=nodes, initializers=weights, opset_imports={"": 21}, name="g")
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "model.onnx")

    found = OnnxRunner(tmp_path / "model.onnx").run({"x": np.eye(64, dtype=np.float32)})["y"]
    np.testing.assert_allclose(found, near @ far, rtol=0, atol=1e-4)
    stored = stored_in_onnx(tmp_path / "model.onnx")
    for name, array in (("near", near), ("far", far)):
        info = TensorInfo(name, "float32", array.shape)
        assert difference(stored[name], info, [array], summed=False) is None
    assert difference(stored["far"], info, [near], summed=False) is not None
