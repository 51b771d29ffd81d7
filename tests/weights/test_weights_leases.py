"""Tensors of large checkpoints, read into memory that is used again."""

from __future__ import annotations

import mmap
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from weights_family import ArrayTensors

from peft_deploy.weights import (
    AdapterTensors,
    Array,
    LoraPair,
    MergedTensors,
    RoundingLoss,
    _mapped,
    fingerprint,
    large_file,
    leases,
    open_checkpoint,
    write_safetensors,
)
from peft_deploy.weights._mapped import FileSpan, map_array, mapped_span
from peft_deploy.weights.large_file import page_aligned, read_past_cache, room_for
from peft_deploy.weights.leases import Lease, Leases
from peft_deploy.weights.pieces import in_order, pieces_of

ROWS, COLUMNS = 300, 500


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    shapes = {"a.weight": (ROWS, COLUMNS), "b.weight": (ROWS, COLUMNS), "c": (7,)}
    tensors = {n: rng.standard_normal(s).astype(np.float16) for n, s in shapes.items()}
    write_safetensors(tmp_path / "model.safetensors", ArrayTensors(tensors))
    return tmp_path / "model.safetensors"


@pytest.fixture
def direct(checkpoint: Path) -> None:
    span = FileSpan(checkpoint, 1, 10)
    if read_past_cache(span, page_aligned(room_for(span))) is None:
        pytest.skip("this file system cannot be read past the page cache")


@pytest.mark.usefixtures("direct")
@pytest.mark.parametrize("name", ["a.weight", "c"])
def test_a_view_is_loaded_as_it_is_seen(checkpoint: Path, name: str) -> None:
    whole = open_checkpoint(checkpoint).read(name)
    for view in (whole, whole.T, whole[1:-2], whole.T[..., 3:], whole[..., ::2]):
        lease = Leases().load(view)
        assert lease is not None
        assert lease.array.strides == view.strides
        assert lease.array.tobytes() == view.tobytes()


def test_what_maps_no_file_is_not_loaded(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped = open_checkpoint(checkpoint).read("a.weight")
    assert mapped_span(np.array(mapped)) is None
    assert mapped_span(mapped[::-1]) is None and mapped_span(mapped[:0]) is None
    assert Leases().load(np.zeros(5)) is None
    monkeypatch.setattr(leases, "_LARGEST", 1000)
    assert Leases().load(mapped) is None


def test_a_file_that_cannot_be_read_so_stays_mapped(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped = map_array(checkpoint, 64, "float16", (2000,))
    span = mapped_span(mapped)
    assert span == FileSpan(checkpoint, 64, 4000)
    with checkpoint.open("r+b") as file:
        file.truncate(2000)
    assert Leases().load(mapped) is None
    monkeypatch.setattr(large_file, "_DIRECT", None)
    assert Leases().load(mapped[:100]) is None


@pytest.mark.usefixtures("direct")
def test_memory_is_used_again_only_when_every_piece_is_there(checkpoint: Path) -> None:
    tensors, pool = open_checkpoint(checkpoint), Leases()

    def halves(array: Array) -> list[Array]:
        return [array[: ROWS // 2].copy(), array[ROWS // 2 :].copy()]

    first = pool.load(tensors.read("a.weight"))
    assert first is not None
    tasks = list(first.over(partial(halves(first.array).__getitem__, i) for i in range(2)))
    tasks[1]()
    second = pool.load(tensors.read("b.weight"))
    assert second is not None and not np.shares_memory(first.array, second.array)
    assert (first.array == tensors.read("a.weight")).all()
    tasks[0]()
    third = pool.load(tensors.read("b.weight"))
    assert third is not None and np.shares_memory(first.array, third.array)
    with pytest.raises(RuntimeError, match="a second time"):
        tasks[0]()


@pytest.mark.usefixtures("direct")
def test_little_memory_waits_for_tensors(checkpoint: Path) -> None:
    tensors, pool = open_checkpoint(checkpoint), Leases()
    held = [pool.load(tensors.read("a.weight")) for _ in range(7)]
    for lease in held:
        assert lease is not None
        assert list(lease.over(iter([]))) == []
    assert len(pool._free) == leases._KEPT


@pytest.mark.usefixtures("direct")
def test_where_no_memory_is_left_tensors_stay_mapped(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(_nbytes: int) -> Array:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(leases, "page_aligned", none)
    assert Leases().load(open_checkpoint(checkpoint).read("a.weight")) is None


def test_a_fingerprint_has_nothing_read_ahead(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wishes: list[int] = []
    monkeypatch.setattr(_mapped._View, "madvise", lambda _view, wish: wishes.append(wish))
    tensors = open_checkpoint(checkpoint)
    first = fingerprint(tensors)
    assert wishes == [mmap.MADV_RANDOM] * 3

    def refused(_view: object, _wish: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(_mapped._View, "madvise", refused)
    assert fingerprint(tensors) == first


def test_a_lease_without_pieces_is_over_at_once() -> None:
    given: list[int] = []
    lease = Lease(np.zeros(3), lambda: given.append(1))
    assert list(lease.over(iter([]))) == [] and given == [1]


@pytest.mark.usefixtures("direct")
@pytest.mark.parametrize("axis", [0, 1])
def test_a_large_model_is_merged_like_a_small_one(
    axis: int, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(1)
    pairs = {
        name: LoraPair(
            rng.standard_normal((ROWS, 4)).astype(np.float32),
            rng.standard_normal((4, COLUMNS)).astype(np.float32),
            0.1,
        )
        for name in "ab"
    }
    tensors, adapter = open_checkpoint(checkpoint), AdapterTensors(pairs, {})
    losses: tuple[dict[str, RoundingLoss], dict[str, RoundingLoss]] = ({}, {})
    small = MergedTensors(tensors, adapter, "float16", losses=losses[0])
    monkeypatch.setattr(large_file, "available_memory", lambda: 1000)
    monkeypatch.setattr("peft_deploy.weights.blocks.BLOCK_BYTES", 64 * 4 * COLUMNS)
    loaded: list[Lease] = []
    load = Leases.load

    def noted(self: Leases, array: Array) -> Lease | None:
        lease = load(self, array)
        assert lease is not None
        loaded.append(lease)
        return lease

    monkeypatch.setattr(Leases, "load", noted)
    large = MergedTensors(tensors, adapter, "float16", losses=losses[1])
    for _ in range(3):
        for name in tensors.names():
            pieces = [list(in_order(pieces_of(s, name, axis))) for s in (small, large)]
            wanted, found = (np.concatenate(p, axis if p[0].ndim > 1 else 0) for p in pieces)
            assert found.tobytes() == wanted.tobytes()
    assert len(loaded) == 6
    assert {n: loss.relative for n, loss in losses[0].items()} == {
        n: loss.relative for n, loss in losses[1].items()
    }
