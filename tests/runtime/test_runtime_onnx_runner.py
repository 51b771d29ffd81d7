from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import tiny_graph
from onnx import TensorProto, helper

from peft_deploy.bundle import MODEL
from peft_deploy.errors import BundleError, ConfigError, ExecutionError, MissingExtraError
from peft_deploy.runtime import ArrayCaching, CachingRunner, OnnxRunner
from peft_deploy.signature import GraphSignature, TensorSpec


def feeds(ids: list[int], past: int = 0) -> dict[str, np.ndarray]:
    count = len(ids)
    rng = np.random.default_rng(3)
    shape = (1, tiny_graph.K, past, tiny_graph.D)
    cache = tiny_graph.signature().past
    return {
        "input_ids": np.array([ids], np.int64),
        "attention_mask": np.ones((1, past + count), np.int64),
        "position_ids": np.arange(count, dtype=np.int64)[None],
        **{spec.name: rng.normal(size=shape).astype(np.float32) for spec in cache},
    }


def test_logits_are_those_of_the_reference(runner: OnnxRunner, weights: dict) -> None:
    ids = [5, 9, 77, 200, 31]
    logits = runner.run(feeds(ids), ["logits"])["logits"]
    expected = tiny_graph.reference_logits(weights, ids)
    assert np.abs(expected).max() > 3
    np.testing.assert_allclose(logits[0], expected, atol=2e-5)


def test_a_prefix_in_the_cache_changes_the_logits_as_in_the_reference(
    runner: OnnxRunner, weights: dict
) -> None:
    ids = [5, 9, 77]
    given = feeds(ids, past=4)
    pairs = [
        (given[f"past_key_values.{i}.key"][0], given[f"past_key_values.{i}.value"][0])
        for i in range(tiny_graph.L)
    ]
    logits = runner.run(given)["logits"]
    expected = tiny_graph.reference_logits(weights, ids, pairs)
    np.testing.assert_allclose(logits[0], expected, atol=2e-5)
    assert np.abs(expected - tiny_graph.reference_logits(weights, ids)).max() > 0.1


def test_only_the_outputs_asked_for_come_in_their_order(runner: OnnxRunner) -> None:
    assert list(runner.run(feeds([1, 2]), ["present.1.value", "logits"])) == [
        "present.1.value",
        "logits",
    ]
    assert list(runner.run(feeds([1, 2]))) == runner.signature.output_names


def test_the_signature_of_a_lone_file_is_what_it_declares(bundle: Path) -> None:
    assert OnnxRunner(bundle / "model.onnx", threads=1).signature == tiny_graph.signature()


def test_steps_with_the_cache_on_the_device_equal_one_run(runner: OnnxRunner) -> None:
    whole = feeds([5, 9, 77, 8])
    expected = runner.run(whole)
    assert isinstance(runner, CachingRunner)
    for steps in (runner, ArrayCaching(runner)):
        cache = steps.load_cache([whole[spec.name] for spec in runner.signature.past])
        for at in range(4):
            given = {
                "input_ids": whole["input_ids"][:, at : at + 1],
                "attention_mask": whole["attention_mask"][:, : at + 1],
                "position_ids": whole["position_ids"][:, at : at + 1],
            }
            logits, cache = steps.step(given, cache)
            np.testing.assert_allclose(logits[0, 0], expected["logits"][0, at], atol=2e-5)
        assert cache.length == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_ids": None}, r"inputs are missing:\n  position_ids"),
        ({"token_type_ids": np.zeros(1)}, r"no such inputs:\n  token_type_ids"),
        ({"input_ids": np.ones((1, 2), np.int32)}, "input_ids is int32; it must be int64"),
        ({"input_ids": np.ones((2,), np.int64)}, r"1 dimensions \(shape \[2\]\); it must have 2"),
        ({"past_key_values.1.key": np.ones((1, 3, 3, 8), np.float32)}, "dimension 1 must be 2"),
        ({"past_key_values.1.key": np.ones((1, 2, 5, 8), np.float32)}, "past = 5.*past = 3"),
        ({"attention_mask": np.ones((1, 2), np.int64)}, r"must be 5 \(past = 3 in .*sequence = 2"),
        ({"position_ids": np.zeros((2, 2), np.int64)}, "batch = 2.*input_ids has batch = 1"),
        ({"input_ids": np.array([[4, -1]])}, "negative value -1"),
        (
            {"input_ids": np.array([[4, tiny_graph.VOCAB]])},
            f"input_ids holds the value {tiny_graph.VOCAB}; .* {tiny_graph.VOCAB - 1}",
        ),
        (
            {"position_ids": np.array([[0, tiny_graph.MAX_POSITIONS]])},
            f"position_ids holds the value {tiny_graph.MAX_POSITIONS}; .* {tiny_graph.MAX_POSITIONS - 1}",
        ),
    ],
)
def test_feeds_that_do_not_fit_are_named(
    runner: OnnxRunner, change: dict[str, np.ndarray | None], message: str
) -> None:
    given = {**feeds([1, 2], past=3), **change}
    given = {name: array for name, array in given.items() if array is not None}
    with pytest.raises(ExecutionError, match=f"(?s){message}"):
        runner.run(given)


def test_unknown_output_is_named(runner: OnnxRunner) -> None:
    with pytest.raises(ExecutionError, match=r"no such outputs:\n  hidden"):
        runner.run(feeds([1]), ["hidden"])


def test_the_reason_that_onnxruntime_gives_is_kept_and_its_log_is_not_shown(
    bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lone = OnnxRunner(bundle / MODEL, threads=1)  # which says nothing of how many positions it has
    past_the_end = tiny_graph.MAX_POSITIONS + 5
    given = {**feeds([1]), "position_ids": np.array([[past_the_end]])}
    with pytest.raises(ExecutionError, match=rf"model\.onnx: .*{past_the_end}") as caught:
        lone.run(given)
    assert "[ONNXRuntimeError]" not in str(caught.value)
    assert caught.value.__cause__ is not None
    assert capfd.readouterr() == ("", "")


def test_a_graph_that_is_not_what_its_signature_says_is_refused(bundle: Path) -> None:
    promised = tiny_graph.signature()
    logits, *rest = promised.outputs
    for output, message in (
        (TensorSpec("scores", logits.dtype, logits.dims), r"these outputs:\n  logits\n  scores"),
        (TensorSpec("logits", "float16", logits.dims), "float32 .* manifest says float16"),
        (
            TensorSpec("logits", "float32", (*logits.dims[:2], 7)),
            f"{tiny_graph.VOCAB}.* manifest says .*7",
        ),
    ):
        wrong = GraphSignature(promised.inputs, (output, *rest))
        with pytest.raises(BundleError, match=message):
            OnnxRunner(bundle, wrong)


def test_bfloat16_goes_in_and_comes_out(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["wide", "wide"], ["double"]),
        helper.make_node("Cast", ["double"], ["y"], to=TensorProto.BFLOAT16),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.BFLOAT16, ["batch", 3]) for name in "xy"
    ]
    graph = helper.make_graph(nodes, "bf16", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(tmp_path / "model.onnx"))
    runner = OnnxRunner(tmp_path)
    assert runner.signature.inputs == (TensorSpec("x", "bfloat16", ("batch", 3)),)
    for rows in (2, 0):
        x = np.linspace(-3, 3, rows * 3).reshape(rows, 3).astype(ml_dtypes.bfloat16)
        y = runner.run({"x": x})["y"]
        assert y.dtype == ml_dtypes.bfloat16
        assert y.shape == (rows, 3)
        np.testing.assert_array_equal(y.astype(np.float32), 2 * x.astype(np.float32))


def test_cuda_where_there_is_none_names_what_there_is(bundle: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(ExecutionError, match=r"there is: .*CPUExecutionProvider") as caught:
        OnnxRunner(bundle, provider="cuda")
    assert "onnxruntime-gpu" in str(caught.value.hint)


def test_options_that_make_no_sense(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'tpu' is unknown; it can be cpu or cuda"):
        OnnxRunner(bundle, provider="tpu")
    with pytest.raises(ConfigError, match="0 threads"):
        OnnxRunner(bundle, threads=0)
    with pytest.raises(BundleError, match="no model at"):
        OnnxRunner(tmp_path)


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"")
    with pytest.raises(BundleError, match="is empty"):
        OnnxRunner(path)
    path.write_bytes(b"GGUF, not ONNX at all")
    with pytest.raises(BundleError, match="not an ONNX model, or is damaged"):
        OnnxRunner(path)


def test_without_onnxruntime_one_sentence_says_so(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "onnxruntime" else real(name, *rest),
    )
    with pytest.raises(MissingExtraError, match="needs the package onnxruntime"):
        OnnxRunner(bundle)


def test_importing_the_runtime_brings_neither_paddle_nor_onnxruntime() -> None:
    code = (
        "import sys, peft_deploy.runtime, peft_deploy.text, peft_deploy.cli.generate;"
        "print([m for m in ('paddle', 'paddlenlp', 'onnxruntime', 'onnx') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
