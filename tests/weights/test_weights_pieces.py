from __future__ import annotations

import threading
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest
from threadpoolctl import ThreadpoolController
from weights_family import ArrayTensors

from peft_deploy.errors import AdapterError, CheckpointError
from peft_deploy.weights import (
    DTYPES,
    AdapterTensors,
    Array,
    LoraPair,
    MergedTensors,
    SubsetTensors,
    contiguous,
    lora_delta,
)
from peft_deploy.weights.blocks import BAND_ROWS
from peft_deploy.weights.cast import all_finite
from peft_deploy.weights.pieces import Task, in_order, pieces_of


def _assembled(source: SubsetTensors | MergedTensors | ArrayTensors, name: str) -> Array:
    return np.concatenate([np.atleast_1d(piece()) for piece in pieces_of(source, name)])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("stored", ["in, out", "out, in"])
def test_a_merge_in_pieces_is_the_whole_tensor_merged_to_the_bit(
    dtype: str, stored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_deploy.weights.blocks.BLOCK_BYTES", 8 << 20)
    rng = np.random.default_rng(3)
    W = rng.standard_normal((2600, 1100)).astype(np.float16)  # 11 MB in float32
    W = W if stored == "in, out" else np.ascontiguousarray(W.T).T
    pair = LoraPair(
        rng.standard_normal((2600, 5)).astype(np.float32),
        rng.standard_normal((5, 1100)).astype(np.float32),
        0.01,
    )
    source = ArrayTensors({"layer.weight": W, "other.weight": W, "left_out": W})
    merged = MergedTensors(source, AdapterTensors({"layer": pair}, {}), dtype)
    subset = SubsetTensors(merged, {"left_out"})
    whole = (contiguous(W).astype(np.float32) + lora_delta(pair)).astype(DTYPES[dtype])
    for found in (_assembled(subset, "layer.weight"), subset.read("layer.weight")):
        assert found.tobytes() == whole.tobytes()
    assert len(list(pieces_of(subset, "layer.weight"))) > 1
    assert _assembled(subset, "other.weight").tobytes() == W.astype(DTYPES[dtype]).tobytes()
    with pytest.raises(KeyError):
        list(pieces_of(subset, "left_out"))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_columns_are_merged_like_rows(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_deploy.weights.blocks.BLOCK_BYTES", 4 * 70 * 9)
    rng = np.random.default_rng(4)
    W = rng.standard_normal((70, 110)).astype(np.float16).T.copy().T
    A, B = (rng.standard_normal(s).astype(np.float32) for s in ((70, 5), (5, 110)))
    source = ArrayTensors({"layer.weight": W, "other.weight": W, "left_out": W})
    adapter = AdapterTensors({"layer": LoraPair(A, B, 0.1)}, {})
    subset = SubsetTensors(MergedTensors(source, adapter, dtype), {"left_out"})
    tolerance = 1e-6 if dtype == "float32" else 1e-3
    for name in subset.names():
        pieces = [piece() for piece in pieces_of(subset, name, 1)]
        assert len(pieces) > 5 and {len(piece) for piece in pieces} == {70}
        found = np.concatenate(pieces, 1)
        assert found.dtype == DTYPES[dtype]
        np.testing.assert_allclose(found, subset.read(name), tolerance, tolerance)


def test_a_source_without_pieces_is_read_whole() -> None:
    values = {
        "a": np.arange(12.0).reshape(3, 4),
        "scalar": np.array(3.5),
        "none": np.zeros((0, 4)),
    }
    source = ArrayTensors(values)
    assert _assembled(source, "a").tolist() == values["a"].tolist()
    assert _assembled(source, "scalar").tolist() == [3.5]
    assert list(pieces_of(source, "none")) == []


def test_errors_of_a_piece_reach_who_takes_them() -> None:
    W = np.full((4, 4), 60000, np.float16)
    pair = LoraPair(np.full((4, 1), 60000, np.float32), np.ones((1, 4), np.float32), 1.0)
    merged = MergedTensors(
        ArrayTensors({"layer.weight": W}), AdapterTensors({"layer": pair}, {}), "float16"
    )
    with pytest.raises(AdapterError, match=r"layer\.weight: the merged weight is not finite"):
        list(in_order(pieces_of(merged, "layer.weight")))
    plain = MergedTensors(
        ArrayTensors({"a": np.full(3, 1e6, np.float32)}), AdapterTensors({}, {}), "float16"
    )
    with pytest.raises(CheckpointError, match="a: 3 values are too large"):
        list(in_order(pieces_of(plain, "a")))


def test_results_come_in_order_and_only_a_few_tasks_run_ahead() -> None:
    begun: list[int] = []

    def tasks() -> Iterator[Task[int]]:
        for i in range(100):
            begun.append(i)
            yield lambda i=i: i  # type: ignore[misc]

    results = in_order(tasks())
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    assert len(begun) < 20
    results.close()
    assert not [t for t in threading.enumerate() if t.name == "peft-deploy_0" and t.is_alive()]
    assert list(in_order(tasks())) == list(range(100))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, -np.nan])
def test_one_value_that_is_not_finite_is_found_in_any_type(dtype: str, bad: float) -> None:
    largest = float(ml_dtypes.finfo(DTYPES[dtype]).max)
    values = np.array([[0.0, -0.0], [largest, -largest], [1e-7, -1.5]]).astype(DTYPES[dtype])
    assert all_finite(values) and all_finite(values.T) and all_finite(values[:0])
    values[1, 1] = bad
    assert not all_finite(values) and not all_finite(values.T)


def test_products_run_in_one_thread_only_while_pieces_are_computed() -> None:
    def threads() -> set[int]:
        found = ThreadpoolController().select(internal_api="openblas").info()
        return {library["num_threads"] for library in found}

    before = threads()
    outer, inner = (in_order(threads for _ in range(3)) for _ in range(2))
    assert next(outer) == next(inner) == {1}
    outer.close()
    assert next(inner) == threads() == {1}
    inner.close()
    assert threads() == before


def test_a_cut_changes_no_bit_of_a_merge() -> None:
    """A product of more rows may add up in another order; so rows are always merged as many at a time."""
    rng = np.random.default_rng(6)
    W = np.zeros((513, 300), np.float32)  # would hide last bits
    A, B = (rng.standard_normal(s).astype(np.float32) for s in ((513, 64), (64, 300)))
    adapter = AdapterTensors({"layer": LoraPair(A, B, 0.1)}, {})
    merged = MergedTensors(ArrayTensors({"layer.weight": W}), adapter)
    whole = merged.read("layer.weight").tobytes()
    for height in (BAND_ROWS, 3 * BAND_ROWS, 1000):
        pieces = in_order(pieces_of(merged, "layer.weight", height=height))
        assert b"".join(piece.tobytes() for piece in pieces) == whole
