# ruff: noqa: E402 (the environment has to be prepared before Paddle's first import)

"""Paddle's combined parameter file: the same bytes that Paddle writes, and refusals of anything else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from peft_deploy.environment import require_paddle

require_paddle("these tests")

import paddle
from paddle import nn

from peft_deploy.errors import CheckpointError
from peft_deploy.weights import contiguous_blocks
from peft_deploy.weights.pdiparams import read_records, record_head

SHAPES = {"float32": [300, 7], "int64": [5], "int32": [2, 1, 3], "bool": [4], "uint8": [129]}


class Tables(nn.Layer):
    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(0)
        for dtype, shape in SHAPES.items():
            self.register_buffer(dtype, paddle.to_tensor(rng.integers(0, 2, shape)).astype(dtype))

    def forward(self, x: paddle.Tensor) -> list[paddle.Tensor]:
        return [x + getattr(self, dtype).astype("float32").sum() for dtype in SHAPES]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A file that Paddle wrote, and its tensors in the file's order."""
    layer, path = Tables(), tmp_path_factory.mktemp("saved") / "tables"
    spec = paddle.static.InputSpec([None, 7], "float32", "x")
    paddle.jit.save(layer, str(path), input_spec=[spec])
    tensors = {b.name: b.numpy() for b in layer.buffers()}
    return path.with_name("tables.pdiparams"), dict(sorted(tensors.items()))


def test_records_are_the_bytes_that_paddle_writes(
    saved: tuple[Path, dict[str, np.ndarray]],
) -> None:
    path, tensors = saved
    ours = b"".join(
        record_head(array.dtype.name, array.shape)
        + b"".join(block.tobytes() for block in contiguous_blocks(array))
        for array in tensors.values()
    )
    assert path.read_bytes() == ours


def test_types_and_shapes_are_read_back(saved: tuple[Path, dict[str, np.ndarray]]) -> None:
    path, tensors = saved
    found = [(record.dtype, record.shape) for record in read_records(path)]
    assert found == [(array.dtype.name, array.shape) for array in tensors.values()]


@pytest.mark.parametrize("shape", [(), (1,), (127,), (128, 300), (2, 3, 4, 5)])
def test_every_rank_and_size_of_dimensions_is_read_back(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    data = np.zeros(shape, np.float16)
    (tmp_path / "file").write_bytes(record_head("float16", shape) + data.tobytes())
    (record,) = read_records(tmp_path / "file")
    assert (record.dtype, record.shape) == ("float16", shape)


@pytest.mark.parametrize("lost", [1, 600])
def test_a_file_that_is_cut_off_is_refused(
    lost: int, saved: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    (tmp_path / "short").write_bytes(saved[0].read_bytes()[:-lost])
    with pytest.raises(CheckpointError, match=r"cut off|damaged"):
        list(read_records(tmp_path / "short"))


@pytest.mark.parametrize("text", [b"PK\x03\x04 is an archive, not a file of weights", b"\0" * 10])
def test_another_kind_of_file_is_refused(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"not a .pdiparams file, or is damaged at byte 0"):
        list(read_records(tmp_path / "other"))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        list(read_records(tmp_path / "missing"))
