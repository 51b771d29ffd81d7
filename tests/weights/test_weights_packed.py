"""Matrices side by side in one tensor."""

from __future__ import annotations

import numpy as np
import pytest

from peft_deploy.errors import CheckpointError
from peft_deploy.weights import Array, PackedTensors, TensorInfo


class Tensors:
    """A source of arrays that counts what is read."""

    def __init__(self, **tensors: Array) -> None:
        self._tensors = tensors
        self.reads: list[str] = []

    def names(self) -> list[str]:
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        array = self._tensors[name]
        return TensorInfo(name, array.dtype.name, array.shape)

    def read(self, name: str) -> Array:
        self.reads.append(name)
        return self._tensors[name]


def numbers(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def test_parts_stand_side_by_side() -> None:
    """Columns in the order of the parts, whichever way a part lies in memory; the rest is as it was."""
    q, k, v, other = numbers(3000, 6), numbers(2, 3000).T, numbers(3000, 1), numbers(4)
    source = Tensors(other=other, k=k, q=q, v=v)
    packed = PackedTensors(source, {"qkv": ("q", "k", "v")})
    assert list(packed.names()) == ["other", "qkv"]
    assert packed.info("qkv") == TensorInfo("qkv", "float32", (3000, 9))
    assert not source.reads
    np.testing.assert_array_equal(packed.read("qkv"), np.concatenate([q, k, v], 1))
    assert source.reads == ["q", "k", "v"]
    assert packed.read("other") is other


def test_biases_are_packed_too() -> None:
    q, k = numbers(5), numbers(2)
    packed = PackedTensors(Tensors(q=q, k=k), {"qk": ("q", "k")})
    np.testing.assert_array_equal(packed.read("qk"), np.concatenate([q, k]))


def test_a_part_is_no_tensor_of_its_own_any_more() -> None:
    packed = PackedTensors(Tensors(q=numbers(2, 3), k=numbers(2, 1)), {"qk": ("q", "k")})
    for name in ("q", "k", "none"):
        with pytest.raises(KeyError):
            packed.read(name)
        with pytest.raises(KeyError):
            packed.info(name)


@pytest.mark.parametrize("other", [numbers(3, 3), numbers(2, 3).astype(np.float16), numbers(2)])
def test_what_does_not_fit_is_refused(other: Array) -> None:
    with pytest.raises(CheckpointError, match=r"k, .* cannot stand beside q, float32"):
        PackedTensors(Tensors(q=numbers(2, 3), k=other), {"qk": ("q", "k")})


def test_pieces_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part comes in pieces of another length; rows stay together. A bias is its parts one after the other."""
    monkeypatch.setattr("peft_deploy.weights.blocks.BLOCK_BYTES", 4 * 60)
    q, k, v = numbers(100, 6), numbers(2, 100).T, numbers(100, 60)
    source = Tensors(q=q, k=k, v=v, bq=numbers(90), bk=numbers(7), other=numbers(50, 4))
    packed = PackedTensors(source, {"qkv": ("q", "k", "v"), "b": ("bq", "bk")})
    for name in packed.names():
        pieces = [task() for task in packed.pieces(name)]
        assert len(pieces) > 1
        np.testing.assert_array_equal(np.concatenate(pieces), packed.read(name))
    with pytest.raises(KeyError):
        list(packed.pieces("q"))
