from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy_decoder import MAX_POSITIONS, SCALING, E, L, NumpyDecoder, Weights, make_weights, merge

from peft_deploy.errors import ExecutionError, ParityError
from peft_deploy.parity import CaseMatrix, Prompt, build_matrix, check

Make = Callable[[NumpyDecoder, Weights, Weights], NumpyDecoder]


def swapped_pairs(lora: Weights, module: str) -> Weights:
    other = dict(lora)
    for m in "AB":
        other[f"0.{module}.{m}"], other[f"1.{module}.{m}"] = (
            lora[f"1.{module}.{m}"],
            lora[f"0.{module}.{m}"],
        )
    return other


def transposed_delta(base: Weights, lora: Weights, key: str) -> Weights:
    """The base plus the transposed product of one square layer."""
    merged = merge(base, lora)
    delta = lora[f"{key}.A"] @ lora[f"{key}.B"]
    merged[key] = (base[key] + SCALING * delta.T).astype(np.float32)
    return merged


def without_one(lora: Weights, key: str) -> Weights:
    return {name: value for name, value in lora.items() if not name.startswith(f"{key}.")}


def rounded(base: Weights, key: str) -> Weights:
    return base | {key: base[key].astype(np.float16).astype(np.float32)}


def permuted_rows(merged: Weights, key: str, head_dim: int = 8) -> Weights:
    """The pairing of rotary dimensions of another convention (i with i+1 in place of i with i+D/2)."""
    weight = merged[key].reshape(E, -1, 2, head_dim // 2)
    return merged | {key: weight.swapaxes(2, 3).reshape(E, -1).copy()}


FAULTS: dict[str, Make] = {
    "adapter left out": lambda good, base, lora: replace(good, base=base),
    "adapter scaled by 1.01": lambda good, base, lora: replace(
        good, base=merge(base, lora, 1.01 * SCALING)
    ),
    "adapter scaled by 0.99": lambda good, base, lora: replace(
        good, base=merge(base, lora, 0.99 * SCALING)
    ),
    "adapter without its scaling": lambda good, base, lora: replace(
        good, base=merge(base, lora, 1.0)
    ),
    "adapter merged twice": lambda good, base, lora: replace(
        good, base=merge(merge(base, lora), lora)
    ),
    "adapter subtracted": lambda good, base, lora: replace(good, base=merge(base, lora, -SCALING)),
    "product transposed": lambda good, base, lora: replace(
        good, base=transposed_delta(base, lora, "1.q")
    ),
    "square weight transposed": lambda good, base, lora: replace(
        good, base=good.base | {"2.o": good.base["2.o"].T.copy()}
    ),
    "one layer's adapter left out": lambda good, base, lora: replace(
        good, base=merge(base, without_one(lora, "2.v"))
    ),
    "adapters of two layers swapped": lambda good, base, lora: replace(
        good, base=merge(base, swapped_pairs(lora, "up"))
    ),
    "one weight rounded to half precision": lambda good, base, lora: replace(
        good, base=rounded(good.base, "2.down")
    ),
    "gate and up swapped": lambda good, base, lora: replace(
        good, base=good.base | {"1.gate": good.base["1.up"], "1.up": good.base["1.gate"]}
    ),
    "rotary rows permuted": lambda good, base, lora: replace(
        good, base=permuted_rows(good.base, "0.q")
    ),
    "one layer repeated": lambda good, base, lora: replace(
        good,
        base=good.base
        | {f"2.{n}": good.base[f"1.{n}"] for n in ("q", "k", "v", "o", "gate", "up", "down")},
    ),
    "mask off by one forward": lambda good, base, lora: replace(good, causal_offset=1),
    "mask off by one backward": lambda good, base, lora: replace(good, causal_offset=-1),
    "padding ignored": lambda good, base, lora: replace(good, ignore_mask=True),
    "first token of the past hidden": lambda good, base, lora: replace(good, forget_past=True),
    "mask too weak": lambda good, base, lora: replace(good, masked=-8.0),
    "positions off by one": lambda good, base, lora: replace(good, position_offset=1),
    "position_ids ignored": lambda good, base, lora: replace(good, own_positions=True),
    "rotary base off by one per cent": lambda good, base, lora: replace(good, theta=10100.0),
    "epsilon 1e-5 in place of 1e-6": lambda good, base, lora: replace(good, epsilon=1e-5),
    "presents of two layers swapped": lambda good, base, lora: replace(good, swap_presents=True),
    "key and value swapped": lambda good, base, lora: replace(good, swap_key_value=True),
    "rows of the batch rotated": lambda good, base, lora: replace(good, roll_logits=True),
    "NaN at padding": lambda good, base, lora: replace(good, nan_at_padding=True),
}


@pytest.mark.parametrize("exact", [True, False], ids=["with float64", "without float64"])
def test_a_correct_bundle_passes(
    reference: NumpyDecoder, good_bundle: NumpyDecoder, matrix: CaseMatrix, exact: bool
) -> None:
    prompts = [Prompt("short", (1, 2, 3)), Prompt("long", (4, 5, 6, 7, 8, 9))]
    report = check(replace(reference, has_exact=exact), good_bundle, matrix, prompts)
    assert report.passed, report.summary()
    assert report.exact is exact
    assert not report.warnings
    assert len(report.cases) == len(matrix.cases)
    assert all(len(case.outputs) == 1 + 2 * L for case in report.cases)
    assert report.generation is not None and report.generation.passed
    assert report.effect is not None and not report.effect.is_blind


# Changes less than the floor that holds without a float64 run.
TOO_SMALL_WITHOUT_EXACT = {"epsilon 1e-5 in place of 1e-6"}


@pytest.mark.parametrize(
    ("fault", "exact"),
    [(fault, True) for fault in FAULTS]
    + [(fault, False) for fault in FAULTS if fault not in TOO_SMALL_WITHOUT_EXACT],
)
def test_every_fault_is_caught(
    fault: str,
    exact: bool,
    reference: NumpyDecoder,
    good_bundle: NumpyDecoder,
    weights: tuple[Weights, Weights],
    matrix: CaseMatrix,
) -> None:
    bundle = FAULTS[fault](good_bundle, *weights)
    report = check(replace(reference, has_exact=exact), bundle, matrix)
    assert not report.passed
    failed = [case for case in report.cases if not case.passed]
    assert failed and report.worst is not None and report.worst[2].used > 1.5


@pytest.mark.parametrize("seed", range(8))
def test_no_false_alarm(seed: int) -> None:
    base, lora = make_weights(seed)
    reference = NumpyDecoder(base, lora)
    # rounds differently in every layer: merged weights, a softmax of other magnitude
    bundle = NumpyDecoder(merge(base, lora), masked=-1e9)
    report = check(reference, bundle, build_matrix(reference.signature, MAX_POSITIONS, seed=seed))
    assert report.passed, report.summary()
    assert report.worst is not None and 0 < report.worst[2].used < 0.7


def test_sensitivity_says_which_error_of_the_adapter_is_seen(
    reference: NumpyDecoder, weights: tuple[Weights, Weights], matrix: CaseMatrix
) -> None:
    base, lora = weights
    report = check(reference, NumpyDecoder(merge(base, lora)), matrix)
    assert report.effect is not None
    seen = report.effect.sensitivity
    assert seen < 1e-4
    strong = NumpyDecoder(merge(base, lora, SCALING * (1 + 10 * seen)))
    assert not check(reference, strong, matrix).passed


@pytest.mark.parametrize(
    ("strength", "words"),
    [(0.0, "changes nothing"), (1e-7, "too little against the rounding noise")],
)
def test_an_adapter_without_effect_proves_nothing(strength: float, words: str) -> None:
    base, lora = make_weights(strength=strength)
    reference = NumpyDecoder(base, lora)
    matrix = build_matrix(reference.signature, MAX_POSITIONS)
    report = check(reference, NumpyDecoder(merge(base, lora)), matrix)
    assert report.passed
    assert len(report.warnings) == 1
    assert words in report.warnings[0] and "proves nothing" in report.warnings[0]


def test_without_an_adapter_there_is_no_effect(
    weights: tuple[Weights, Weights], matrix: CaseMatrix
) -> None:
    report = check(NumpyDecoder(weights[0]), NumpyDecoder(weights[0]), matrix)
    assert report.passed and report.effect is None and not report.warnings


def test_a_reference_at_odds_with_itself_is_named_and_not_the_measure(
    reference: NumpyDecoder, good_bundle: NumpyDecoder, matrix: CaseMatrix
) -> None:
    """A family that ignores padding is no excuse for a bundle that does."""
    odd = replace(reference, ignore_mask=True)
    assert check(odd, good_bundle, matrix).passed
    report = check(odd, replace(good_bundle, ignore_mask=True), matrix)
    assert not report.passed
    named = [w for w in report.warnings if "disagrees with itself" in w]
    assert any("left padding" in w for w in named)
    assert not any("real text" in w for w in named)


def test_a_reference_of_nan_is_an_error(
    weights: tuple[Weights, Weights], good_bundle: NumpyDecoder, matrix: CaseMatrix
) -> None:
    broken = dict(weights[0])
    broken["1.q"] = np.full_like(broken["1.q"], np.nan)
    with pytest.raises(ParityError, match="NaN or infinite values in"):
        check(NumpyDecoder(broken, weights[1]), good_bundle, matrix)


class Refusing(NumpyDecoder):
    """Runs only batches of one, as a graph with a fixed batch does."""

    def run(self, feeds, outputs=None):  # type: ignore[no-untyped-def]
        if feeds["input_ids"].shape[0] != 1:
            raise ExecutionError("the batch is fixed at 1")
        return super().run(feeds, outputs)


def test_a_graph_that_does_not_run_fails_with_its_reason(
    reference: NumpyDecoder, good_bundle: NumpyDecoder, matrix: CaseMatrix
) -> None:
    prompts = [Prompt("a", (1, 2)), Prompt("b", (3, 4))]
    report = check(reference, Refusing(good_bundle.base), matrix, prompts)
    assert not report.passed
    for case, planned in zip(report.cases, matrix.cases, strict=True):
        assert case.passed is (len(planned.texts) == 1)
        assert case.problem == (None if case.passed else "the batch is fixed at 1")
    assert report.generation is not None and report.generation.problem == "the batch is fixed at 1"


class Misshapen(NumpyDecoder):
    def run(self, feeds, outputs=None):  # type: ignore[no-untyped-def]
        results = super().run(feeds, outputs)
        return results | {"present.1.key": results["present.1.key"].transpose(0, 2, 1, 3)}


def test_an_output_of_another_shape_fails(
    reference: NumpyDecoder, good_bundle: NumpyDecoder, matrix: CaseMatrix
) -> None:
    report = check(reference, Misshapen(good_bundle.base), matrix)
    assert not report.passed
    assert any("present.1.key has shape" in (case.problem or "") for case in report.cases)


class Counting:
    def __init__(self) -> None:
        self.phases: list[tuple[str, int | None]] = []
        self.units = 0

    def phase(self, title: str, total: int | None = None, unit: str = "") -> None:
        self.phases.append((title, total))

    def advance(self, amount: int = 1, item: str = "") -> None:
        self.units += amount


def test_progress_adds_up(
    reference: NumpyDecoder, good_bundle: NumpyDecoder, matrix: CaseMatrix
) -> None:
    progress = Counting()
    check(reference, good_bundle, matrix, [Prompt("a", (1, 2))], progress=progress)
    assert sum(total or 0 for _, total in progress.phases) == progress.units
