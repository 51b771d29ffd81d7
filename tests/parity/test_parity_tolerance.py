from __future__ import annotations

from dataclasses import replace

import pytest

from peft_deploy.parity import Difference, Limit, derive_limit
from peft_deploy.parity.tolerance import FLOOR_WITHOUT_EXACT, K, is_sane

NOISE = Difference(
    max_abs=2e-4,
    mean_abs=2e-5,
    p99_abs=1e-4,
    scale=20.0,
    cosine=1.0,
    index=(0,),
    expected=1.0,
    actual=1.0,
)


def test_the_limit_is_k_times_the_largest_noise() -> None:
    limit = derive_limit([replace(NOISE, max_abs=1e-4), NOISE], exact=True)
    assert limit.maximum == pytest.approx(K * 1e-5)
    assert limit.mean == pytest.approx(K * 1e-6)
    assert (limit.noise_maximum, limit.noise_mean) == pytest.approx((1e-5, 1e-6))


def test_the_floor_is_a_few_roundings() -> None:
    silent = replace(NOISE, max_abs=0.0, mean_abs=0.0)
    limit = derive_limit([silent], exact=True)
    assert limit.maximum == 16 * 2.0**-24
    assert limit.mean == 2 * 2.0**-24
    assert derive_limit([silent], exact=True, dtype="float16").maximum == 4 * 2.0**-11
    assert derive_limit([silent], exact=False).maximum == FLOOR_WITHOUT_EXACT


def test_either_statistic_breaks_the_limit() -> None:
    limit = Limit(maximum=1e-4, mean=1e-5)
    assert limit.used(replace(NOISE, max_abs=1e-3, mean_abs=1e-6)) == pytest.approx(0.5)
    assert limit.used(replace(NOISE, max_abs=4e-3, mean_abs=1e-6)) == pytest.approx(2)
    assert limit.used(replace(NOISE, max_abs=1e-3, mean_abs=6e-4)) == pytest.approx(3)
    assert limit.used(replace(NOISE, unequal_specials=1)) == float("inf")


def test_what_is_too_far_for_rounding_is_not_noise() -> None:
    assert is_sane(NOISE)
    assert not is_sane(replace(NOISE, max_abs=0.05))
    assert not is_sane(replace(NOISE, unequal_specials=1))
