"""Tensors kept as several others: what the file gets, and what a graph computes with."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from peft_deploy.adapters.formats.peft_writer import ArraySource
from peft_deploy.errors import CheckpointError
from peft_deploy.weights import (
    BlockQuantized,
    DecodedTensors,
    EncodedTensors,
    PackedTensors,
    Storage,
    TensorInfo,
)
from peft_deploy.weights.pieces import in_order, joined, pieces_of
from peft_deploy.weights.source import Array


class Eighths:
    """Multiples of an eighth of each column's largest value, as int8 and the scales."""

    name = "eighths"
    axis = 1

    def __init__(self) -> None:
        self.encoded: list[str] = []

    def parts(self, info: TensorInfo) -> Mapping[str, TensorInfo]:
        return {
            ".codes": TensorInfo("", "int8", info.shape[::-1]),
            ".scales": TensorInfo("", "float32", info.shape[1:]),
        }

    def encode(self, tensor: Array, name: str) -> Mapping[str, Array]:
        self.encoded.append(name)
        scales = np.abs(tensor).max(0) / 8
        return {".codes": np.rint(tensor / scales).astype(np.int8).T, ".scales": scales}

    def decode(self, parts: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
        return parts[".codes"].T.astype(np.float32).reshape(shape) * parts[".scales"]


def test_the_file_gets_the_parts_and_a_graph_the_numbers_they_stand_for() -> None:
    rng = np.random.default_rng(0)
    weights = {
        "linear.weight": rng.standard_normal((6, 4)).astype(np.float32),
        "norm.weight": rng.standard_normal(6).astype(np.float16),
    }
    storage = Eighths()
    plan = {"linear.weight": storage, "no.such": storage}
    source = EncodedTensors(ArraySource(weights), plan)
    assert list(source.names()) == ["linear.weight.codes", "linear.weight.scales", "norm.weight"]
    written = {name: source.read(name) for name in source.names()}
    assert storage.encoded == ["linear.weight"]  # once for both parts
    for name, array in written.items():
        info = source.info(name)
        assert (info.dtype, info.shape) == (array.dtype.name, array.shape)
    stored = source.stored["linear.weight"]
    assert stored.parts == {
        ".codes": "linear.weight.codes",
        ".scales": "linear.weight.scales",
    }
    parts = {suffix: written[name] for suffix, name in stored.parts.items()}

    decoded = DecodedTensors(ArraySource(weights), plan)
    kept = decoded.read("linear.weight")
    np.testing.assert_array_equal(kept, stored.storage.decode(parts, stored.info.shape))
    assert 0 < np.abs(kept - weights["linear.weight"]).max() < 0.5
    np.testing.assert_array_equal(decoded.read("norm.weight"), weights["norm.weight"])
    assert {decoded.info(name).dtype for name in decoded.names()} == {"float32"}
    assert decoded.read("norm.weight").dtype == np.float32


STORAGES = [BlockQuantized(4), BlockQuantized(8), BlockQuantized(4, rows=True), Eighths()]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_deploy.weights.blocks.BLOCK_BYTES", 4 * 64 * 5)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: f"{s.name}-{s.axis}")
@pytest.mark.parametrize("stored", ["in, out", "out, in"])
def test_pieces_are_those_of_the_whole_tensor(storage: Storage, stored: str) -> None:
    """Whichever part comes first, whole or half taken, and whichever way the tensor lies."""
    weight = np.random.default_rng(1).standard_normal((64, 96)).astype(np.float32)
    given = weight if stored == "in, out" else np.ascontiguousarray(weight.T).T
    source = EncodedTensors(ArraySource({"w": given}), {"w": storage})
    whole = storage.encode(weight, "w")
    for suffixes in (list(whole), list(whole)[::-1]):
        for suffix in suffixes:
            pieces = [task() for task in pieces_of(source, f"w{suffix}")]
            assert len(pieces) > 5 and max(len(piece) for piece in pieces) < 20
            np.testing.assert_array_equal(np.concatenate(pieces), whole[suffix])
    first, second = (f"w{suffix}" for suffix in whole)
    next(pieces_of(source, first))()
    found = joined(source.info(second), in_order(pieces_of(source, second)))
    np.testing.assert_array_equal(found, whole[second.removeprefix("w")])
    np.testing.assert_array_equal(source.read(first), whole[first.removeprefix("w")])
    kept = DecodedTensors(ArraySource({"w": given}), {"w": storage}).read("w")
    np.testing.assert_array_equal(kept, storage.decode(whole, weight.shape))


@pytest.mark.usefixtures("small_pieces")
def test_packed_layers_are_encoded_as_each_of_them() -> None:
    rng = np.random.default_rng(2)
    q, k = (rng.standard_normal((64, n)).astype(np.float32) for n in (40, 23))
    packed = PackedTensors(ArraySource({"q": q, "k": k.T.copy().T}), {"qk": ("q", "k")})
    source = EncodedTensors(packed, {"qk": BlockQuantized(4)})
    for name in source.names():
        suffix = name.removeprefix("qk")
        apart = [BlockQuantized(4).encode(part, "w")[suffix] for part in (q, k)]
        np.testing.assert_array_equal(source.read(name), np.concatenate(apart))


@pytest.mark.usefixtures("small_pieces")
def test_what_cannot_be_encoded_is_an_error_for_every_part() -> None:
    weight = np.ones((64, 96), np.float32)
    weight[5, 90] = np.nan
    source = EncodedTensors(ArraySource({"w": weight}), {"w": BlockQuantized(4)})
    for name in (*source.names(), *source.names()):
        with pytest.raises(CheckpointError, match="w holds NaN"):
            source.read(name)
