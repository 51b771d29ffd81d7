from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tracemalloc
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weights_family import BFLOAT16, save_pdparams

from peft_deploy.errors import CheckpointError
from peft_deploy.weights.pdparams import PdparamsFile

PROTOCOLS = [2, 3, 4]
ARRAYS = {
    "f32": np.linspace(-3, 3, 35, dtype=np.float32).reshape(5, 7),
    "f64": np.array([0.1, -1e300]),
    "f16": np.array([[1.5, -65504]], np.float16),
    "bf16": np.array([[1.5, -3e38], [0.0, 2.0]]).astype(BFLOAT16),
    "i64": np.arange(-3, 3),
    "i32": np.arange(4, dtype=np.int32),
    "i16": np.arange(4, dtype=np.int16),
    "i8": np.arange(-4, 4, dtype=np.int8),
    "u8": np.arange(256, dtype=np.uint8),
    "bool": np.array([True, False]),
    "scalar": np.array(2.5, np.float32),
    "empty": np.empty((0, 3), np.float32),
    "columns": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    # longer than what the reader keeps of a text, with every byte in it
    "long": np.random.default_rng(1).standard_normal((60, 50)).astype(np.float32),
}


def written(tmp_path: Path, content: Any, protocol: int = 4) -> Path:
    path = tmp_path / "x.pdparams"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_type_and_shape_reads_as_it_was_written(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "x.pdparams"
    save_pdparams(path, ARRAYS, protocol)
    file = PdparamsFile(path)
    assert list(file.names()) == list(ARRAYS)
    for name, array in ARRAYS.items():
        read = file.read(name)
        assert read.dtype == array.dtype
        assert read.shape == array.shape == file.info(name).shape
        assert file.info(name).dtype == array.dtype.name
        assert np.array_equal(read, array)


def test_what_paddle_itself_writes(tmp_path: Path) -> None:
    code = """
import numpy as np, paddle
paddle.seed(7)
layer = paddle.nn.Linear(6, 9)
state = layer.state_dict()
state["half"] = paddle.randn([3, 5]).astype("bfloat16")
state["long"] = paddle.randn([70, 40])
state["count"] = paddle.to_tensor(3)
for protocol in (2, 3, 4):
    paddle.save(state, f"{protocol}.pdparams", protocol=protocol)
paddle.save({"w": state["long"], "note": {"t": state["half"]}}, "nested.pdparams")
np.savez("x.npz", **{k: v.astype("float64").numpy() for k, v in state.items()})
"""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    if "No module named 'paddle'" in run.stderr:
        pytest.skip("Paddle is not installed")
    assert run.returncode == 0, run.stderr
    expected = np.load(tmp_path / "x.npz")
    for protocol in PROTOCOLS:
        file = PdparamsFile(tmp_path / f"{protocol}.pdparams")
        assert list(file.names()) == ["weight", "bias", "half", "long", "count"] == expected.files
        assert file.info("half").dtype == "bfloat16"
        for name in file.names():
            assert np.array_equal(file.read(name).astype(np.float64), expected[name])
    with pytest.raises(CheckpointError, match="'note' is not a tensor but a dict"):
        PdparamsFile(tmp_path / "nested.pdparams")


def test_tensors_written_as_pairs_of_name_and_data(tmp_path: Path) -> None:
    path = written(tmp_path, {"w": ("linear_0.w_0", ARRAYS["f32"])})
    assert np.array_equal(PdparamsFile(path).read("w"), ARRAYS["f32"])


def test_an_ordered_dict(tmp_path: Path) -> None:
    path = written(tmp_path, OrderedDict(b=ARRAYS["f32"], a=ARRAYS["f64"]))
    assert list(PdparamsFile(path).names()) == ["b", "a"]


@pytest.mark.parametrize("protocol", [2, 3])
def test_arrays_that_paddle_cut_into_slices(tmp_path: Path, protocol: int) -> None:
    """The layout of paddle.save for arrays over 4 GiB in protocols 2 and 3, made small."""
    whole = np.random.default_rng(2).standard_normal((40, 50)).astype(np.float32)
    flat = whole.reshape(-1)
    parts = {"w@@.0": flat[:900], "w@@.1": flat[900:1800], "w@@.2": flat[1800:]}
    table = {"w": {"OriginShape": whole.shape, "slices": list(parts)}}
    path = written(tmp_path, {"v": flat[:3], **parts, "UnpackBigParamInfor@@": table}, protocol)
    file = PdparamsFile(path)
    assert sorted(file.names()) == ["v", "w"]
    assert np.array_equal(file.read("w"), whole)


@pytest.mark.parametrize(
    "table",
    [
        {"w": {"OriginShape": (4, 4), "slices": ["w@@.0", "w@@.1"]}},
        {"w": {"OriginShape": (3,), "slices": ["w@@.0", "w@@.9"]}},
        {"w": {"OriginShape": (3,), "slices": []}},
        {"w": {"slices": ["w@@.0"]}},
        [1],
    ],
)
def test_a_table_of_slices_that_does_not_fit(tmp_path: Path, table: object) -> None:
    parts = {"w@@.0": np.zeros(2, np.float32), "w@@.1": np.zeros(1, np.float32)}
    with pytest.raises(CheckpointError, match=r"slices|table of cut arrays"):
        PdparamsFile(written(tmp_path, {**parts, "UnpackBigParamInfor@@": table}))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_opening_reads_no_data_and_reading_one_tensor_holds_no_other(
    tmp_path: Path, protocol: int
) -> None:
    count, each = 12, 1 << 20
    arrays = {
        f"w{i}": np.full(each // 4, i + 0.5, np.float32).reshape(512, -1) for i in range(count)
    }
    path = tmp_path / "x.pdparams"
    save_pdparams(path, arrays, protocol)
    tracemalloc.start()
    try:
        file = PdparamsFile(path)
        opening = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        for name in file.names():
            assert file.read(name)[3, 5] == arrays[name][3, 5]
        reading = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert opening < each / 4
    # protocol 2 keeps the data as text, which is decoded in pieces into one new array
    assert reading < each * (2.5 if protocol == 2 else 0.5)
    if protocol != 2:
        assert not file.read("w0").flags.owndata


def test_opening_a_large_file_reads_a_few_bytes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.pdparams"
    save_pdparams(path, {f"w{i}": np.ones((1024, 1024), np.float32) for i in range(4)})
    taken = 0
    import peft_deploy.weights._pickle_machine as machine

    original = machine.PickleMachine._take

    def counting(self: Any, count: int) -> bytes:
        nonlocal taken
        taken += count
        return original(self, count)

    monkeypatch.setattr(machine.PickleMachine, "_take", counting)
    PdparamsFile(path)
    assert 0 < taken < 4096 < path.stat().st_size


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_shape_that_does_not_fit_the_data(tmp_path: Path, protocol: int) -> None:
    path = written(tmp_path, {"w": ARRAYS["f32"]}, protocol)
    raw = path.read_bytes()
    assert raw.count(b"K\x05K\x07") == 1  # [5, 7]
    path.write_bytes(raw.replace(b"K\x05K\x07", b"K\x05K\x06"))
    with pytest.raises(CheckpointError, match=r"w \[5, 6\] takes 120 bytes, but has 140"):
        PdparamsFile(path)


def test_a_shape_that_does_not_fit_data_kept_as_text(tmp_path: Path) -> None:
    """The number of bytes shows when they are decoded, unless there can be no such text."""
    path = written(tmp_path, {"w": ARRAYS["long"]}, protocol=2)
    raw = path.read_bytes()
    assert raw.count(b"K<K2") == 1  # [60, 50]
    for columns, expected in ((51, 12240), (49, 11760)):
        path.write_bytes(raw.replace(b"K<K2", b"K<K" + bytes([columns])))
        file = PdparamsFile(path)
        with pytest.raises(CheckpointError, match=rf"w is damaged: .*{expected}"):
            file.read("w")
    path.write_bytes(raw.replace(b"K<K2", b"K<K\x0a"))
    with pytest.raises(CheckpointError, match=r"w \[60, 10\] takes 2400 bytes"):
        PdparamsFile(path)


def test_bytes_after_the_end_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, {"w": ARRAYS["f32"]})
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match="1 bytes follow its end"):
        PdparamsFile(path)


# Files that try to run something.

MARKER = "it-ran"


class Calls:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


def touch(marker: Path) -> list[Any]:
    code = f"open({str(marker)!r}, 'w').close()"
    return [
        Calls(os.system, f"touch {marker}"),
        Calls(eval, code),
        Calls(exec, code),
        Calls(getattr, Calls(__import__, "os"), "system"),
        Calls(getattr, "x", "upper"),
        Calls(__import__, "os"),
        Calls(subprocess.Popen, ["touch", str(marker)]),
        Calls(open, str(marker), "w"),
        Calls(np.load, str(marker)),
        Calls(bytearray, 1 << 40),
        Calls(tuple, [Calls(os.system, f"touch {marker}")]),
        [{"deep": (Calls(eval, code),)}],
    ]


@pytest.mark.parametrize("index", range(12))
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nothing_in_a_file_is_run(tmp_path: Path, index: int, protocol: int) -> None:
    marker = tmp_path / MARKER
    payload = touch(marker)[index]
    for content in (payload, {"w": payload}, {"w": ARRAYS["f32"], "evil": [payload]}):
        path = written(tmp_path, content, protocol)
        with pytest.raises(CheckpointError):
            PdparamsFile(path)
        assert not marker.exists()


def test_the_same_file_does_run_in_pythons_own_unpickler(tmp_path: Path) -> None:
    """Otherwise the test above would prove nothing."""
    marker = tmp_path / MARKER
    path = written(tmp_path, {"w": touch(marker)[0]})
    pickle.loads(path.read_bytes())  # noqa: TID251
    assert marker.exists()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_refused_global_is_named(tmp_path: Path, protocol: int) -> None:
    path = written(tmp_path, {"w": Calls(os.system, "true")}, protocol)
    with pytest.raises(
        CheckpointError, match=r"holds (posix|nt)\.system.*nothing in the file was run"
    ):
        PdparamsFile(path)


@pytest.mark.parametrize(
    "stream",
    [
        b"cos\nsystem\n(S'true'\ntR.",  # protocol 0
        b"\x80\x02cnumpy\nndarray.__reduce__\n.",  # a dotted name
        b"\x80\x04\x8c\x05numpy\x8c\x16ndarray.tofile.__self__\x93.",
        b"\x80\x02(ios\nsystem\n.",  # INST
        b"\x80\x02cnumpy\nndarray\n)\x81.",  # NEWOBJ of an admitted global
        b"\x80\x02cnumpy\nndarray\nK\x01\x85R.",  # calling ndarray itself
        b"\x80\x02cbuiltins\ntuple\n}b.",  # BUILD on a class
        b"\x80\x02}}b.",
        b"\x80\x02P1\n.",  # a persistent id
        b"\x80\x02\x82\x01.",  # an extension code
        b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R.",  # another codec
        b"\x80\x05\x96\x04\x00\x00\x00\x00\x00\x00\x00abcd.",  # protocol 5
        b"\x80\x02]K\x01K\x02e.",  # APPENDS without a mark
        b"\x80\x02K\x01.K\x02.",  # something after the end
        b"\x80\x02(K\x01.",  # an open mark
        b"\x80\x02h\x05.",  # an unknown memo
        b"\x80\x02.",  # nothing on the stack
        b"\x80\x02}NK\x01s.",  # a key that is no text
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # eight exabytes
        b"",
        b"PK\x03\x04 a zip file of torch",
    ],
)
def test_streams_that_numpy_never_writes_are_refused(tmp_path: Path, stream: bytes) -> None:
    path = tmp_path / "x.pdparams"
    path.write_bytes(stream)
    with pytest.raises(CheckpointError, match=r"x\.pdparams"):
        PdparamsFile(path)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_files_give_a_clear_error_or_the_right_shape(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Every byte may be wrong: never a crash, never another exception."""
    path = tmp_path_factory.mktemp("fuzz") / "x.pdparams"
    protocol = data.draw(st.sampled_from(PROTOCOLS))
    save_pdparams(path, {"a": ARRAYS["f32"], "b": ARRAYS["bf16"]}, protocol)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        file = PdparamsFile(path)
        for name in file.names():
            assert file.read(name).shape == file.info(name).shape
    except CheckpointError as exc:
        assert str(path) in exc.message


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_file_cut_anywhere_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("cut") / "x.pdparams"
    save_pdparams(path, ARRAYS, data.draw(st.sampled_from(PROTOCOLS)))
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(CheckpointError, match=r"x\.pdparams"):
        PdparamsFile(path)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([1, 2], ">f4"), "numpy type >f4"),
        (np.array([1 + 2j]), "numpy type <c16"),
        (np.array(["ab"]), "numpy type <U2"),
        (np.zeros(2, [("x", "f4")]), "type with fields"),
        (np.array([{}], object), "Python objects"),
    ],
)
def test_arrays_of_other_types_are_refused(
    tmp_path: Path, array: np.ndarray, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        PdparamsFile(written(tmp_path, {"w": array}))


def test_a_training_state_is_not_taken_for_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'step' is not a tensor but a int") as caught:
        PdparamsFile(written(tmp_path, {"w": ARRAYS["f32"], "step": 3}))
    assert caught.value.hint


def test_what_is_not_a_dictionary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no dictionary of tensors, but a numpy array"):
        PdparamsFile(written(tmp_path, ARRAYS["f32"]))
