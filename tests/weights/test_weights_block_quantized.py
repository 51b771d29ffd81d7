"""Weights in blocks: what is decoded is what onnxruntime's quantizer meant, and what its operators compute with."""

from __future__ import annotations

import logging

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from peft_deploy.errors import CheckpointError
from peft_deploy.weights import BlockQuantized, DecodedTensors, EncodedTensors, TensorInfo
from peft_deploy.weights.block_quantized import BLOCK, QUANTIZED, SCALES

SIZES = [
    (64, 5),
    (33, 70),
    (20, 3),
    (96, 1030),
]  # whole blocks, a block and one, less than one, several batches
FLOAT = ir.TensorType(ir.DataType.FLOAT)


def matrix(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("shape", SIZES)
def test_no_number_is_further_off_than_its_block_allows(
    bits: int, rows: bool, shape: tuple[int, int]
) -> None:
    weight = matrix(shape)
    storage = BlockQuantized(bits, rows)
    parts = storage.encode(weight, "w")
    error = np.abs(storage.decode(parts, shape) - weight)
    step = np.abs(np.repeat(parts[SCALES], BLOCK, axis=1))
    step = step[:, : shape[1]] if rows else step[:, : shape[0]].T
    # Half a step, but for the number opposite of the largest one: there are 2^(bits-1) steps down and one less up.
    assert (error <= step * 1.001).all()
    assert np.mean(error <= step * 0.501) > 0.9
    assert {k: (v.dtype.name, v.shape) for k, v in parts.items()} == {
        k: (v.dtype, v.shape) for k, v in storage.parts(TensorInfo("w", "float32", shape)).items()
    }


@pytest.mark.parametrize(("bits", "searched"), [(4, False), (8, False), (4, True)])
@pytest.mark.parametrize("shape", SIZES)
def test_decoded_numbers_are_those_that_onnxruntime_multiplies_by(
    bits: int, searched: bool, shape: tuple[int, int]
) -> None:
    size, out = shape
    importance = np.linspace(0.1, 9, size, dtype=np.float32) if searched else None
    storage = BlockQuantized(bits, importance=importance)
    parts = storage.encode(matrix(shape), "w")
    x = ir.Value(name="x", type=FLOAT, shape=ir.Shape(["rows", size]))
    weights = [ir.val(name, const_value=ir.tensor(parts[name], name=name)) for name in parts]
    node = ir.node(
        "MatMulNBits",
        [x, *weights],
        {"K": size, "N": out, "bits": bits, "block_size": BLOCK, "accuracy_level": 1},
        domain="com.microsoft",
    )
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", FLOAT, ir.Shape(["rows", out])
    opsets = {"": 21, "com.microsoft": 1}
    graph = ir.Graph([x], [y], nodes=[node], initializers=weights, opset_imports=opsets, name="g")
    data = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    given = matrix((3, size), 1)
    found = session.run(None, {"x": given})[0]
    assert list(parts) == [QUANTIZED, SCALES]
    np.testing.assert_allclose(found, given @ storage.decode(parts, shape), rtol=0, atol=3e-5)


def test_columns_do_not_depend_on_each_other() -> None:
    left, right = matrix((64, 40)), matrix((64, 24), 1)
    storage = BlockQuantized(4)
    whole = storage.encode(np.concatenate([left, right], 1), "w")
    for name, part in whole.items():
        apart = [storage.encode(side, "w")[name] for side in (left, right)]
        np.testing.assert_array_equal(part, np.concatenate(apart))


def test_a_column_of_zeros_stays_zero() -> None:
    storage = BlockQuantized(4)
    zeros = np.zeros((40, 3), np.float32)
    assert not storage.decode(storage.encode(zeros, "w"), zeros.shape).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    weight = matrix((64, 4))
    weight[3, 2] = bad
    with pytest.raises(CheckpointError, match="w holds NaN or infinite values"):
        BlockQuantized(4).encode(weight, "w")


def test_a_file_and_a_check_get_the_same_numbers() -> None:
    class Source:
        def names(self) -> list[str]:
            return ["w", "norm"]

        def info(self, name: str) -> TensorInfo:
            return TensorInfo(name, "float32", (64, 6) if name == "w" else (64,))

        def read(self, name: str) -> np.ndarray:
            return matrix((64, 6)) if name == "w" else np.ones(64, np.float32)

    plan = {"w": BlockQuantized(4)}
    encoded, decoded = EncodedTensors(Source(), plan), DecodedTensors(Source(), plan)
    assert encoded.names() == ["w.quantized", "w.scales", "norm"]
    written = {suffix: encoded.read(f"w{suffix}") for suffix in (QUANTIZED, SCALES)}
    np.testing.assert_array_equal(plan["w"].decode(written, (64, 6)), decoded.read("w"))


def test_logging_is_left_as_it_was() -> None:
    before = list(logging.getLogger().handlers), logging.getLogger().level
    BlockQuantized(8).encode(matrix((32, 2)), "w")
    assert (list(logging.getLogger().handlers), logging.getLogger().level) == before
