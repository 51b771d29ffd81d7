from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from weights_family import BFLOAT16

from peft_deploy.errors import CheckpointError
from peft_deploy.weights.safetensors_file import SafetensorsFile

ARRAYS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.array([1.5, -2.5, 3.0]).astype(BFLOAT16),
    "c": np.array(7.25, np.float64),
    "d": np.arange(6, dtype=np.int64).reshape(1, 2, 3),
    "e": np.array([True, False, True]),
    "f": np.empty((0, 5), np.float16),
    "g": np.array([[3, 250]], np.uint8),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "x.safetensors"
    save_file(ARRAYS, path, metadata={"format": "np", "who": "me"})
    return path


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_every_type_and_shape_reads_as_it_was_written(path: Path) -> None:
    file = SafetensorsFile(path)
    assert set(file.names()) == set(ARRAYS)
    assert file.metadata == {"format": "np", "who": "me"}
    for name, array in ARRAYS.items():
        read = file.read(name)
        assert read.dtype == array.dtype
        assert read.shape == array.shape == file.info(name).shape
        assert file.info(name).dtype == array.dtype.name
        assert np.array_equal(read, array)


def test_read_is_a_view_of_the_file(path: Path) -> None:
    read = SafetensorsFile(path).read("a")
    assert not read.flags.writeable
    assert not read.flags.owndata


def test_data_need_not_be_aligned(tmp_path: Path) -> None:
    values = np.array([1.0, -2.0, 65280.0], np.float32)
    header = {"odd": entry("U8", [1], 0, 1), "x": entry("F32", [3], 1, 13)}
    header["y"] = entry("BF16", [3], 13, 19)
    data = b"\x07" + values.tobytes() + values.astype(BFLOAT16).tobytes()
    file = SafetensorsFile(raw_file(tmp_path / "x.safetensors", header, data))
    assert np.array_equal(file.read("x"), values)
    assert np.array_equal(file.read("y").astype(np.float32), values)


@pytest.mark.parametrize("format", ["np", None])
def test_uint16_of_paddlenlp_is_bfloat16(tmp_path: Path, format: str | None) -> None:
    values = np.array([1.5, -3.25]).astype(BFLOAT16)
    path = tmp_path / "x.safetensors"
    save_file({"w": values.view(np.uint16)}, path, metadata={"format": format} if format else None)
    read = SafetensorsFile(path).read("w")
    assert read.dtype == BFLOAT16
    assert np.array_equal(read, values)


def test_uint16_of_torch_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"w": np.zeros(2, np.uint16)}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="w has the type U16"):
        SafetensorsFile(path)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_file_cut_anywhere_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("cut") / "x.safetensors"
    save_file(ARRAYS, path)
    whole = path.read_bytes()
    length = data.draw(st.integers(0, len(whole) - 1))
    path.write_bytes(whole[:length])
    with pytest.raises(CheckpointError, match=r"x\.safetensors is cut short") as caught:
        SafetensorsFile(path)
    assert str(length) in caught.value.message


def test_a_cut_file_names_both_sizes(path: Path) -> None:
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=rf"describes {size} bytes, the file has {size - 5}"):
        SafetensorsFile(path)


def test_a_file_cut_after_opening_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"w": np.ones((64, 1024), np.float32)}, path)
    file = SafetensorsFile(path)
    path.write_bytes(path.read_bytes()[:4096])
    with pytest.raises(CheckpointError, match="cannot be read"):
        file.read("w")


def test_bytes_after_the_data_are_refused(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"xx")
    with pytest.raises(CheckpointError, match="too long"):
        SafetensorsFile(path)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{not json", b"", "not JSON"),
        (b"[" * 5000, b"", "not JSON"),
        ([1], b"", "not a JSON object"),
        ({"w": [1]}, b"", "entry for w is damaged"),
        ({"w": entry("F32", [2], 0, 4)}, bytes(4), "w has 4 bytes of data, .* takes 8"),
        ({"w": entry("F32", [-1], 0, 4)}, bytes(4), "whole numbers"),
        ({"w": entry("F32", [True], 0, 4)}, bytes(4), "whole numbers"),
        ({"w": entry("F8_E4M3", [4], 0, 4)}, bytes(4), "w has the type F8_E4M3"),
        ({"v": entry("U8", [4], 0, 4), "w": entry("U8", [4], 2, 6)}, bytes(6), "data of w begins"),
        (
            {"v": entry("U8", [4], 0, 4), "w": entry("U8", [4], 6, 10)},
            bytes(10),
            "data of w begins",
        ),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
        (b'{"w":{},"w":{}}', b"", "lists w twice"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(
    tmp_path: Path, header: object, data: bytes, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFile(raw_file(tmp_path / "x.safetensors", header, data))


def test_a_header_of_absurd_length_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        SafetensorsFile(path)
