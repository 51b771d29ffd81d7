from __future__ import annotations

import pytest

from peft_deploy.parity.shortened import sample_layers


@pytest.mark.parametrize(
    ("total", "count", "layers"),
    [(32, 1, (0,)), (32, 2, (0, 31)), (32, 3, (0, 16, 31)), (5, 9, (0, 1, 2, 3, 4)), (1, 4, (0,))],
)
def test_layers_lie_evenly(total: int, count: int, layers: tuple[int, ...]) -> None:
    assert sample_layers(total, count) == layers


def test_other_seeds_take_other_layers_between_the_first_and_the_last() -> None:
    drawn = {sample_layers(32, 5, seed) for seed in range(1, 9)}
    assert len(drawn) > 4
    for layers in drawn:
        assert layers[0] == 0 and layers[-1] == 31 and len(set(layers)) == 5
        assert list(layers) == sorted(layers)
    assert sample_layers(32, 5, 3) == sample_layers(32, 5, 3)
