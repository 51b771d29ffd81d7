from __future__ import annotations

import numpy as np
import pytest

from peft_deploy.weights import DTYPES, LoraPair, RoundingLoss, merge_weight


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
    loss = RoundingLoss()
    result = merge_weight(W, pair, dtype="bfloat16", loss=loss, before=before if given else None)
    exact = W.astype(np.float64) + 2.0 * (pair.A.astype(np.float64) @ pair.B.astype(np.float64))
    lost = np.linalg.norm(result.astype(np.float64) - exact)
    assert loss.relative == pytest.approx(lost / np.linalg.norm(exact - before), rel=1e-3)
    assert loss.relative > 0.1
    whole = RoundingLoss()
    whole.add_all(before, exact, result)
    assert whole.relative == pytest.approx(loss.relative, rel=1e-3)


def test_nothing_changed_is_nothing_lost() -> None:
    loss = RoundingLoss()
    values = np.array(1.5, np.float32)
    loss.add_all(values, values, values.astype(DTYPES["float16"]))
    assert loss.relative == 0.0
