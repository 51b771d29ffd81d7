"""Graphs in 16 bits: what keeps float32, and that no mask makes anything infinite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from peft_deploy.convert.precision import HalfPrecisionPass
from peft_deploy.signature import GraphSignature, TensorSpec

LOWEST = float(np.finfo(np.float32).min)
WIDTH = 8

NORM = """
<ir_version: 10, opset_import: ["" : 21]>
norm (float[batch, 8] x) => (float[batch, 8] y)
<float[1] epsilon = {1e-6}>
{
    square = Mul(x, x)
    mean = ReduceMean <keepdims = 1, noop_with_empty_axes = 0> (square, axes)
    shifted = Add(mean, epsilon)
    root = Sqrt(shifted)
    normal = Div(x, root)
    scaled = Mul(normal, weight)
    y = MatMul(scaled, matrix)
}
"""

ATTENTION = """
<ir_version: 10, opset_import: ["" : 23]>
attend (float[batch, heads, tokens, 4] x, int64[batch, all] mask) => (float[batch, heads, tokens, 4] y)
<float[1] one = {1.0}, float[1] masked = {3.4028234663852886e38}>
{
    keep = Cast <to = 9> (mask)
    truth = Cast <to = 1> (keep)
    narrow = Unsqueeze(truth, places)
    wide = Expand(narrow, rows)
    off = Sub(wide, one)
    bias = Mul(off, masked)
    y = Attention <scale = 1.0> (x, x, x, ADDED)
}
"""


def weights(**arrays: np.ndarray[Any, Any]) -> dict[str, ir.Value]:
    values = {}
    for name, array in arrays.items():
        values[name] = ir.val(name, const_value=ir.tensor(array, name=name))
    return values


def graph_of(text: str, **arrays: np.ndarray[Any, Any]) -> ir.Model:
    model = ir.from_onnx_text(text)
    for name, value in weights(**arrays).items():
        for node in model.graph:
            for index, used in enumerate(node.inputs):
                if used is not None and used.name == name:
                    node.replace_input_with(index, value)
        model.graph.register_initializer(value)
    return model


def signature_of(model: ir.Model) -> GraphSignature:
    def specs(values: Any) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                value.name,
                value.dtype.numpy().name,
                tuple(d if isinstance(d, int) else str(d) for d in value.shape),
            )
            for value in values
        )

    return GraphSignature(specs(model.graph.inputs), specs(model.graph.outputs))


def run(model: ir.Model, feeds: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    data = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    result: np.ndarray[Any, Any] = session.run(None, dict(feeds))[0]
    return result


@pytest.fixture
def norm() -> ir.Model:
    rng = np.random.default_rng(0)
    return graph_of(
        NORM,
        axes=np.array([1], np.int64),
        weight=rng.standard_normal(WIDTH).astype(np.float16),
        matrix=rng.standard_normal((WIDTH, WIDTH)).astype(np.float16),
    )


def convert(model: ir.Model, dtype: str) -> HalfPrecisionPass:
    done = HalfPrecisionPass(dtype, signature_of(model))
    done(model)
    return done


def test_a_norm_keeps_float32_and_the_product_does_not(norm: ir.Model) -> None:
    done = convert(norm, "float16").done
    assert done is not None
    # x goes in as float32, so nothing of the norm is rounded before the product.
    assert done.float32 == {"Mul": 2, "ReduceMean": 1, "Add": 1, "Sqrt": 1, "Div": 1}
    product = next(node for node in norm.graph if node.op_type == "MatMul")
    assert {value.dtype for value in product.inputs} == {ir.DataType.FLOAT16}
    assert norm.graph.outputs[0].dtype == ir.DataType.FLOAT
    assert norm.graph.outputs[0].name == "y"
    x = np.full((1, WIDTH), 3000, np.float32)  # its square is beyond float16
    assert np.isfinite(run(norm, {"x": x})).all()


def test_numbers_are_those_of_float32_up_to_rounding(norm: ir.Model) -> None:
    x = np.random.default_rng(1).standard_normal((4, WIDTH)).astype(np.float32)
    tensors = [norm.graph.initializers[name].const_value for name in ("weight", "matrix")]
    weight, matrix = (t.numpy().astype(np.float64) for t in tensors if t is not None)
    want = x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-6) * weight @ matrix
    convert(norm, "float16")
    np.testing.assert_allclose(run(norm, {"x": x}), want, atol=2e-3 * np.abs(want).max())


@pytest.mark.parametrize("positional", [False, True])
def test_a_row_of_padding_is_no_nan_and_positions_keep_their_digits(positional: bool) -> None:
    text = ATTENTION.replace("ADDED", "bias")
    extra = {}
    if positional:
        text = text.replace("(x, x, x, bias)", "(x, x, x, sloped)").replace(
            "    y = Att", "    sloped = Add(bias, slopes)\n    y = Att"
        )
        extra["slopes"] = np.linspace(0, 900.7, 6, dtype=np.float32).reshape(1, 1, 1, 6)
    sizes = {"places": np.array([1, 2], np.int64), "rows": np.array([1, 1, 6, 1], np.int64)}
    model = graph_of(text, **sizes, **extra)
    x = np.random.default_rng(2).standard_normal((2, 1, 6, 4)).astype(np.float32)
    feeds = {"x": x, "mask": np.array([[0] * 6, [0, 0, 1, 1, 1, 1]], np.int64)}
    want = run(model.clone(), feeds)
    done = convert(model, "float16").done
    assert done is not None
    assert ("Attention" in done.float32) is positional
    have = run(model, feeds)
    assert np.isfinite(have).all()
    np.testing.assert_allclose(have[1], want[1], atol=4e-3)


def test_numbers_that_16_bits_cannot_hold_stay_float32() -> None:
    text = NORM.replace("1e-6", "1e-30").replace("Div(x, root)", "Mul(x, epsilon)")
    arrays = {"axes": np.array([1], np.int64), "weight": np.ones(8, np.float16)}
    model = graph_of(text, **arrays, matrix=np.eye(8, dtype=np.float16))
    done = convert(model, "float16").done
    assert done is not None
    tiny = model.graph.initializers["epsilon"]
    assert tiny.dtype == ir.DataType.FLOAT
    assert all(user.node.op_type != "Cast" for user in tiny.uses())
