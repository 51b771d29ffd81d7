"""The check of layers that no family knows: what is drawn, how dimensions are named, and that faults show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from peft_deploy.config.layer_signature import LayerSignature
from peft_deploy.errors import ExecutionError, ParityError
from peft_deploy.parity.layer_cases import draw_cases, name_dimensions
from peft_deploy.parity.layer_check import check_layer
from peft_deploy.signature import GraphSignature, TensorSpec

SAID = LayerSignature.from_dict(
    {
        "inputs": [
            {"name": "ids", "dtype": "int64", "dims": ["batch", "sequence"], "range": [3, 9]},
            {"name": "memory", "dtype": "float32", "dims": ["batch", "past", 4]},
            {"name": "flags", "dtype": "bool", "dims": ["batch"]},
        ],
        "outputs": ["scores", "best"],
        "sizes": {"past": [2, 7]},
    }
)
OUTPUTS = (
    TensorSpec("scores", "float32", ("batch", "sequence")),
    TensorSpec("best", "int64", ("batch",)),
)


class Layer:
    """``scores`` and ``best`` in NumPy, as a reference or, with a fault, as a bundle."""

    def __init__(
        self,
        dtype: str = "float32",
        fault: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        strength: float = 1.0,
    ) -> None:
        inputs = (
            TensorSpec(s.name, s.dtype.replace("float32", dtype), s.dims) for s in SAID.inputs
        )
        self.signature = GraphSignature(tuple(inputs), OUTPUTS)
        self.fault, self.strength = fault, strength

    def run(
        self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None
    ) -> dict[str, Any]:
        memory = feeds["memory"].sum((1, 2))  # [B]
        scores = np.sin(feeds["ids"] * memory[:, None]) + self.strength * feeds["flags"][:, None]
        results = {
            "scores": scores.astype(feeds["memory"].dtype),
            "best": 100_000 + scores.argmax(-1),
        }
        return results if self.fault is None else self.fault(results)

    def exact(self) -> Layer | None:
        return Layer("float64", strength=self.strength)

    def without_adapters(self) -> Layer | None:
        return Layer(strength=0.0)


def test_every_batch_size_meets_every_other_size_in_range() -> None:
    cases = draw_cases(SAID)
    assert {(c.sizes["batch"], c.sizes["sequence"]) for c in cases} == {
        (batch, sequence) for batch in (1, 3) for sequence in (1, 5, 12)
    }
    assert {c.sizes["past"] for c in cases} == {2, 7}
    for case in cases:
        ids = case.feeds["ids"]
        assert ids.dtype == np.int64 and ids.min() >= 3 and ids.max() <= 8
        assert case.feeds["memory"].shape == (case.sizes["batch"], case.sizes["past"], 4)
        assert case.feeds["flags"].dtype == np.bool_
    again = draw_cases(SAID)[0].feeds["memory"]
    np.testing.assert_array_equal(cases[0].feeds["memory"], again)
    assert not np.array_equal(draw_cases(SAID, seed=1)[0].feeds["memory"], again)


def test_dimensions_of_outputs_are_named_after_what_they_follow() -> None:
    cases = draw_cases(SAID)
    traced = GraphSignature(SAID.inputs, (TensorSpec("y", "float32", ("y.0", "y.1", "y.2", 4)),))
    shapes = [
        {"y": (c.sizes["batch"], c.sizes["sequence"] + c.sizes["past"], 2 * c.sizes["past"], 4)}
        for c in cases
    ]
    named = name_dimensions(traced, SAID, cases, shapes)
    assert named.outputs[0].dims == ("batch", "sequence+past", "past+past", 4)
    shapes[0] = {"y": (*shapes[0]["y"][:3], 5)}
    with pytest.raises(ParityError, match="the layer gives y"):
        name_dimensions(traced, SAID, cases, shapes)


def test_what_computes_the_same_passes() -> None:
    report = check_layer(Layer(), Layer(), draw_cases(SAID))
    assert report.passed and report.exact and not report.warnings
    assert len(report.cases) == 6
    assert report.effect is not None and report.effect.sensitivity < 0.01


def broken(name: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda results: {**results, name: change(results[name])}


@pytest.mark.parametrize(
    "fault",
    [
        broken("scores", lambda values: values * 1.001),
        broken("scores", lambda values: values[:, ::-1]),
        broken("scores", lambda values: np.where(values > 0.5, np.nan, values)),
        broken("scores", lambda values: values[:, :1]),
        broken("best", lambda values: values + 1),  # a hundred-thousandth of the value
        broken("best", lambda values: values.astype(np.float32)),
    ],
)
def test_what_computes_something_else_fails(fault: Any) -> None:
    report = check_layer(Layer(), Layer(fault=fault), draw_cases(SAID))
    assert not report.passed
    assert "failed" in report.summary()


def test_a_bundle_without_the_adapter_fails() -> None:
    assert not check_layer(Layer(), Layer(strength=0.0), draw_cases(SAID)).passed


def test_an_adapter_without_effect_is_said() -> None:
    report = check_layer(Layer(strength=0.0), Layer(strength=0.0), draw_cases(SAID))
    assert report.passed and "proves nothing" in report.warnings[0]


def test_a_layer_that_gives_nan_proves_nothing() -> None:
    fault = broken("scores", lambda values: values * np.nan)
    with pytest.raises(ParityError, match="NaN values in scores"):
        reference = Layer(fault=fault)
        reference.exact = lambda: None  # type: ignore[method-assign]
        check_layer(reference, Layer(), draw_cases(SAID))


def test_a_layer_held_to_float32_has_wider_limits() -> None:
    class Held(Layer):
        def run(self, feeds: Any, outputs: Any = None) -> Any:
            raise ExecutionError("matmul of float32 and float64")

    reference = Layer()
    reference.exact = lambda: Held("float64")  # type: ignore[method-assign]
    report = check_layer(reference, Layer(), draw_cases(SAID))
    assert report.passed and not report.exact
    wrong = Layer(fault=broken("scores", lambda values: values * 1.001))
    assert not check_layer(reference, wrong, draw_cases(SAID)).passed
