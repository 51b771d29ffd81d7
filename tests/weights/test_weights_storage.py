"""Tensors kept as several others: what the file gets, and what a graph computes with."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from peft_deploy.adapters.formats.peft_writer import ArraySource
from peft_deploy.weights import DecodedTensors, EncodedTensors, TensorInfo
from peft_deploy.weights.source import Array


class Eighths:
    """Multiples of an eighth of each column's largest value, as int8 and the scales."""

    name = "eighths"

    def __init__(self) -> None:
        self.encoded: list[str] = []

    def parts(self, info: TensorInfo) -> Mapping[str, TensorInfo]:
        return {
            ".codes": TensorInfo("", "int8", info.shape),
            ".scales": TensorInfo("", "float32", info.shape[1:]),
        }

    def encode(self, tensor: Array, name: str) -> Mapping[str, Array]:
        self.encoded.append(name)
        scales = np.abs(tensor).max(0) / 8
        return {".codes": np.rint(tensor / scales).astype(np.int8), ".scales": scales}

    def decode(self, parts: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
        return parts[".codes"].astype(np.float32).reshape(shape) * parts[".scales"]


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
