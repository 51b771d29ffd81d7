# ruff: noqa: E402 (the environment has to be prepared before Paddle's first import)
"""Any layer traced by its own forward."""

from __future__ import annotations

from typing import Any

import pytest

from peft_deploy.environment import require_paddle

require_paddle("these tests")

import paddle
from paddle import nn

from peft_deploy.config.layer_signature import LayerSignature
from peft_deploy.errors import ConfigError, TraceError
from peft_deploy.trace.layer import takes_names, trace_layer
from peft_deploy.trace.program import module_of


def signature(*inputs: str, outputs: tuple[str, ...] = ("y",)) -> LayerSignature:
    """Inputs ``name`` are float32 [batch, 4]."""
    entries = [{"name": n, "dtype": "float32", "dims": ["batch", 4]} for n in inputs]
    return LayerSignature.from_dict({"inputs": entries, "outputs": list(outputs)})


class Mixed(nn.Layer):
    """Parameters, buffers of both kinds, dropout, and results of every structure."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1D(4)
        self.unused, self.dropout = nn.Linear(2, 2), nn.Dropout(0.5)
        self.register_buffer("table", paddle.arange(4, dtype="float32"), persistable=False)

    def forward(self, x: Any, scale: Any = None, bias: Any = None) -> Any:
        y = self.dropout(self.norm(self.linear(x + self.table)))
        if bias is not None:
            y = y + bias
        return {"pair": (y, None), "same": y, "input": x, "more": x + 1.0}


class Returns(nn.Layer):
    """A layer that returns what a function makes of its input."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any, y: Any = None) -> Any:
        return self.function(x)


def state_of(layer: nn.Layer) -> dict[str, dict[str, Any]]:
    """Everything in every part; that it has been called is Paddle's own note."""
    parts = layer.named_sublayers(include_self=True)
    return {name: {k: v for k, v in vars(p).items() if k != "_built"} for name, p in parts}


def test_weights_go_by_their_names_and_nothing_of_the_layer_changes() -> None:
    layer = Mixed()
    layer.eval()
    layer(paddle.ones([2, 4]))  # BatchNorm1D finds out about its input when it is first called
    layer.train()
    before = state_of(layer)
    traced = trace_layer(layer, signature("x", "bias", outputs=("a", "b", "c", "d")))
    assert set(traced.parameters.values()) == {
        *(f"linear.{n}" for n in ("weight", "bias")),
        *(f"norm.{n}" for n in ("weight", "bias", "_mean", "_variance")),
        "table",
    }
    assert state_of(layer) == before
    assert [spec.dims for spec in traced.signature.outputs] == [(f"{n}.0", 4) for n in "abcd"]


def test_operators_know_the_module_that_they_are_of() -> None:
    layer = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    for _ in range(2):  # however often something has been traced
        traced = trace_layer(layer, signature("input"))
        modules = {
            op.name(): module_of(op)
            for op in traced.program.global_block().ops
            if op.name() in ("pd_op.matmul", "pd_op.relu")
        }
        assert modules == {"pd_op.matmul": "1.0", "pd_op.relu": "1.1"}


def test_outputs_that_are_one_value_are_kept_apart() -> None:
    traced = trace_layer(Mixed(), signature("x", outputs=("a", "b", "c", "d")))
    fetched = [
        op.operand_source(0).get_defining_op().name()
        for op in traced.program.global_block().ops
        if op.name() == "pd_op.fetch"
    ]
    assert fetched[1:] == ["pd_op.assign"] * 3


def test_outputs_are_taken_by_name_where_a_mapping_has_them() -> None:
    layer = Returns(lambda x: {"z": x.mean(), "y": x * x})
    assert trace_layer(layer, signature("x")).signature.outputs[0].dims == ("y.0", 4)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: (x * x, x.mean()), "returns 2 tensors; the signature names 1 outputs: y"),
        (lambda x: (x * x, 3), "returns a int, which is no tensor"),
        (lambda x: x @ "x", "Returns could not be traced"),
        (lambda x: x * held(x), "Returns could not be traced"),
    ],
)
def test_results_that_are_refused(function: Any, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        trace_layer(Returns(function), signature("x"))


def test_the_reason_and_the_line_are_said() -> None:
    """Paddle's own text begins with a listing and ends with the address of a manual."""

    def branching(x: Any) -> Any:
        return x * x if bool(x.sum() > 0) else x

    expected = r"could not be traced: TypeError: bool\(Tensor\).*\(.*test_trace_layer\.py:\d+\)$"
    with pytest.raises(TraceError, match=expected):
        trace_layer(Returns(paddle.jit.not_to_static(branching)), signature("x"))


HELD = paddle.ones([4])


def held(_x: Any) -> paddle.Tensor:
    return HELD


def test_an_input_that_no_output_needs_is_refused() -> None:
    with pytest.raises(TraceError, match="the inputs y have no part in any output of Returns"):
        trace_layer(Returns(lambda x: x * x), signature("x", "y", outputs=("z",)))


@pytest.mark.parametrize(
    ("layer", "names", "message", "hint"),
    [
        (Mixed(), ("x", "offset"), "input offset, and Mixed.forward has no such argument", "call"),
        (nn.Linear(4, 4), ("inputs",), "it takes input", "inputs: did you mean input?"),
        (nn.Linear(4, 4), ("x",), "it takes input", "call every input as the forward calls"),
    ],
)
def test_an_input_is_called_as_the_forward_calls_it(
    layer: nn.Layer, names: tuple[str, ...], message: str, hint: str
) -> None:
    """By position, it could be taken for another one."""
    with pytest.raises(ConfigError, match=message) as caught:
        takes_names(layer, signature(*names))
    assert hint in (caught.value.hint or "")


def test_a_forward_of_further_keywords_gets_them() -> None:
    class Open(nn.Layer):
        def forward(self, pixels: Any, **more: Any) -> Any:
            return pixels + more["offset"]

    assert takes_names(Open(), signature("pixels", "offset"))
    with pytest.raises(ConfigError, match="input pixel, and Open"):
        takes_names(Open(), signature("pixel", "offset"))


def test_weights_of_another_type_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"(?s)not float32:\n.*weight: float64"):
        trace_layer(nn.Linear(4, 4).to(dtype="float64"), signature("input"))
