"""The check of bundles in 16 bits: limits, the range of activations, and what a lower precision costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from peft_deploy.errors import ParityError
from peft_deploy.parity.cases import Text
from peft_deploy.parity.compare import Difference
from peft_deploy.parity.loss import measure_loss
from peft_deploy.parity.play import Results
from peft_deploy.parity.range import check_range
from peft_deploy.parity.tolerance import K_16, ROUNDOFF, derive_limit
from peft_deploy.runtime.runner import Array
from peft_deploy.signature import LOGITS, GraphSignature, causal_lm_signature

VOCABULARY = 5
SIGNATURE = causal_lm_signature(
    num_layers=1, num_kv_heads=1, head_dim=2, vocab_size=VOCABULARY, dtype="float32"
)


def error_of(largest: float, mean: float) -> Difference:
    return Difference(largest, mean, 0, 1.0, 1.0, (0,), 0, 0)


def test_the_limit_of_16_bits_is_their_own_noise() -> None:
    noise = [error_of(0.002, 0.0004), error_of(0.003, 0.0002)]
    limit = derive_limit(noise, exact=True, dtype="float16")
    assert limit.maximum == pytest.approx(K_16 * 0.003)
    assert limit.mean == pytest.approx(K_16 * 0.0004)
    # An output without noise may still be rounded.
    silent = derive_limit([error_of(0, 0)], exact=True, dtype="float16")
    assert ROUNDOFF["float16"] < silent.maximum < 0.003
    coarser = derive_limit([error_of(0, 0)], exact=True, dtype="bfloat16")
    assert coarser.maximum == pytest.approx(8 * silent.maximum)


def test_activations_beyond_the_range_name_their_modules() -> None:
    peaks = {"layers.0.mlp": 70000.0, "layers.1.mlp": 20000.0, "norm": 3.0}
    with pytest.raises(ParityError, match=r"layers\.0\.mlp: 7e\+04") as caught:
        check_range(peaks, "float16")
    assert "layers.1" not in caught.value.message
    assert "bf16" in (caught.value.hint or "")
    del peaks["layers.0.mlp"]
    [warning] = check_range(peaks, "float16")
    assert "layers.1.mlp: 2e+04" in warning
    assert "norm" not in warning
    assert check_range({"layers.0.mlp": 70000.0}, "bfloat16") == []
    with pytest.raises(ParityError):
        check_range({"norm": math.nan}, "bfloat16")


class Fixed:
    """Gives the same logits whatever it reads."""

    signature: GraphSignature = SIGNATURE

    def __init__(self, logits: Array) -> None:
        self.logits = logits

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        tokens = feeds["input_ids"].shape[1]
        cache = np.zeros((1, 1, tokens, 2), np.float32)
        return {LOGITS: self.logits[None], "present.0.key": cache, "present.0.value": cache}


def test_the_loss_of_a_bundle_is_measured_in_nats() -> None:
    want = np.log(np.array([[0.5, 0.2, 0.1, 0.1, 0.1], [0.2, 0.5, 0.1, 0.1, 0.1]], np.float32))
    have = np.log(np.array([[0.5, 0.2, 0.1, 0.1, 0.1], [0.6, 0.1, 0.1, 0.1, 0.1]], np.float32))
    text = Text("prose", np.array([3, 1], np.int64))
    known = Results({LOGITS: want[None]})
    loss = measure_loss(Fixed(have), known, text, precision="fp16", real_text=True)
    apart = 0.2 * math.log(0.2 / 0.6) + 0.5 * math.log(0.5 / 0.1)
    assert loss.kl == pytest.approx(apart / 2)
    assert loss.kl_max == pytest.approx(apart)
    assert loss.top1 == 0.5
    assert loss.perplexity == pytest.approx(1 / 0.2)  # of token 1 behind token 3
    assert loss.perplexity_fp32 == pytest.approx(1 / 0.2)
    assert "50.0 %" in loss.sentence()
    assert loss.to_dict()["cosine"][LOGITS] < 1
