from __future__ import annotations

import pytest
from numpy_decoder import MAX_POSITIONS, NumpyDecoder, Weights, make_weights, merge

from peft_deploy.parity import CaseMatrix, build_matrix


@pytest.fixture
def weights() -> tuple[Weights, Weights]:
    return make_weights()


@pytest.fixture
def reference(weights: tuple[Weights, Weights]) -> NumpyDecoder:
    return NumpyDecoder(*weights)


@pytest.fixture
def good_bundle(weights: tuple[Weights, Weights]) -> NumpyDecoder:
    return NumpyDecoder(merge(*weights))


@pytest.fixture
def matrix(reference: NumpyDecoder) -> CaseMatrix:
    return build_matrix(reference.signature, MAX_POSITIONS)
