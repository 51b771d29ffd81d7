from __future__ import annotations

import numpy as np
import pytest
from weights_family import ArrayTensors

from peft_deploy.weights import (
    DTYPES,
    AdapterTensors,
    LoraPair,
    MergedTensors,
    RoundingLoss,
    merge_weight,
)
from peft_deploy.weights.rounding import describe_losses, lossy


@pytest.mark.parametrize("given", [False, True])
def test_the_loss_of_a_matrix_that_takes_several_blocks(given: bool) -> None:
    """``given``: training began with another weight than the one that is merged into."""
    rng = np.random.default_rng(0)
    W = rng.standard_normal((1600, 2000)).astype(np.float32)  # 12.8 MB, blocks are 8 MiB
    W[:1000] *= 8  # so that no block speaks for the others
    pair = LoraPair(
        rng.standard_normal((1600, 3)).astype(np.float32),
        (rng.standard_normal((3, 2000)) * 0.01).astype(np.float32),
        2.0,
    )
    before = W + np.float32(0.05) if given else W
    losses: dict[str, RoundingLoss] = {}
    merged = MergedTensors(
        ArrayTensors({"layer.weight": W}),
        AdapterTensors({"layer": pair}, {}),
        "bfloat16",
        losses=losses,
        original=ArrayTensors({"layer.weight": before}),
    )
    result = merged.read("layer.weight")
    assert (result == merge_weight(W, pair, dtype="bfloat16")).all()
    exact = W.astype(np.float64) + 2.0 * (pair.A.astype(np.float64) @ pair.B.astype(np.float64))
    lost = np.linalg.norm(result.astype(np.float64) - exact)
    # Of 124 rows, whose changes are sums of three squares: their mean is known to 0.82 / sqrt(124),
    # and its root to half of that.
    found = losses["layer.weight"].relative
    assert found == pytest.approx(lost / np.linalg.norm(exact - before), rel=4 * 0.037)
    assert found > 0.1


def test_nothing_changed_is_nothing_lost() -> None:
    loss = RoundingLoss()
    values = np.array([1.5], np.float32)
    loss.add(values, values, values.astype(DTYPES["float16"]))
    assert loss.relative == 0.0


@pytest.mark.parametrize(("size", "share"), [(1e-4, 1e-3), (1e-7, 0.4)])
def test_what_float32_loses_is_measured_on_a_sample(size: float, share: float) -> None:
    rng = np.random.default_rng(1)
    W = rng.standard_normal((900, 1000)).astype(np.float32)
    pair = LoraPair(
        rng.standard_normal((900, 3)).astype(np.float32),
        (rng.standard_normal((3, 1000)) * size).astype(np.float32),
        1.0,
    )
    losses: dict[str, RoundingLoss] = {}
    source = ArrayTensors({"layer.weight": W})
    adapter = AdapterTensors({"layer": pair}, {})
    merged = MergedTensors(source, adapter, "float32", losses=losses, sampled=True)
    result = merged.read("layer.weight")
    exact = W.astype(np.float64) + pair.A.astype(np.float64) @ pair.B.astype(np.float64)
    lost = np.linalg.norm(result - exact) / np.linalg.norm(exact - W)
    assert losses["layer.weight"].relative == pytest.approx(lost, rel=0.02)
    assert share / 10 < lost < share * 3
    plain = MergedTensors(source, adapter, "float32", losses=(unasked := {}))
    assert (plain.read("layer.weight") == result).all() and unasked == {}


def test_a_warning_names_the_layers() -> None:
    shares = {"a.weight": 0.3, "b.weight": 0.9, "c.weight": 0.2}
    text = describe_losses("bfloat16", shares)
    assert text is not None and "in 2 tensors" in text and "c.weight" not in text
    assert "float32 all of it" in text
    assert list(lossy(shares)) == ["b.weight", "a.weight"]
    text = describe_losses("float32", shares)
    assert text is not None and "hardly changes these layers" in text
    assert describe_losses("bfloat16", {"c.weight": 0.2}) is None
