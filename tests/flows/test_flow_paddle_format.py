# ruff: noqa: E402 (the environment has to be prepared before Paddle's first import)

"""Bundles in Paddle's static format: from the same traced program, under Paddle Inference and paddle.jit.load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from flows_loops import plain_loop

from peft_deploy.environment import require_paddle

require_paddle("these tests")

import paddle
from paddle import inference

import peft_deploy
from peft_deploy.bundle import Manifest
from peft_deploy.cli import cli
from peft_deploy.config.export import ExportOptions
from peft_deploy.errors import BundleError, ConfigError, ExecutionError
from peft_deploy.parity.play import empty_cache
from peft_deploy.runtime import OnnxRunner, PaddleRunner, open_runner
from peft_deploy.signature import LOGITS, past_names

pytestmark = pytest.mark.convert

PROMPT = [3, 17, 5, 9, 40, 2, 33]


@pytest.fixture(scope="module")
def exported(tiny_llama: Path, tiny_adapter: Path, tmp_path_factory: Any) -> Any:
    output = tmp_path_factory.mktemp("paddle") / "bundle"
    options = ExportOptions(format="paddle")
    return peft_deploy.export(tiny_llama, output, adapter=tiny_adapter, options=options)


@pytest.fixture
def copied(exported: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported.output, tmp_path / "copy"))


def feeds_of(signature: Any, past: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(past)
    total = past + len(PROMPT)
    cache = dict(zip(past_names(2), empty_cache(signature, 1).values(), strict=True))
    if past:
        cache = {
            name: rng.standard_normal((1, array.shape[1], past, array.shape[3]), np.float32)
            for name, array in cache.items()
        }
    return {
        "input_ids": np.array([PROMPT]),
        "attention_mask": np.ones((1, total), np.int64),
        "position_ids": np.arange(past, total)[None],
        **cache,
    }


def test_every_case_of_the_matrix_agrees_with_the_dynamic_graph(exported: Any) -> None:
    assert exported.parity.passed and not exported.parity.warnings
    assert exported.parity.generation is not None
    errors = [o.difference.relative_max for c in exported.parity.cases for o in c.outputs.values()]
    assert max(errors) <= 1e-4
    groups = {case.group for case in exported.parity.cases}
    assert {"one token, no past", "padding on the left", "prefill in chunks"} <= groups


def test_files_and_manifest(exported: Any) -> None:
    names = {p.name for p in exported.output.iterdir()}
    assert names >= {"model.json", "model.pdiparams", "config.json", "tokenizer.json"}
    assert not {"model.onnx", "genai_config.json"} & names
    manifest = Manifest.read(exported.output)
    assert (manifest.format, manifest.opset) == ("paddle", None)
    assert set(manifest.files) == names - {"peft_deploy.json"}


def test_files_do_not_depend_on_the_process_that_made_them(
    exported: Any, tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    peft_deploy.export(
        tiny_llama,
        tmp_path / "again",
        adapter=tiny_adapter,
        options=ExportOptions(format="paddle", validate=False),
    )
    again, first = Manifest.read(tmp_path / "again"), Manifest.read(exported.output)
    for file in ("model.json", "model.pdiparams"):
        assert again.files[file] == first.files[file]


def test_signature_and_results_are_those_of_the_onnx_bundle(
    exported: Any, merged_bundle: Path
) -> None:
    ours, onnx = open_runner(exported.output), open_runner(merged_bundle)
    assert isinstance(ours, PaddleRunner) and isinstance(onnx, OnnxRunner)
    assert ours.signature == onnx.signature
    for past in (0, 3, 0):
        feeds = feeds_of(ours.signature, past)
        results, wanted = ours.run(feeds), onnx.run(feeds)
        assert list(results) == list(wanted)
        for name, values in wanted.items():
            np.testing.assert_allclose(results[name], values, atol=2e-5 * np.abs(values).max())


def test_paddle_inference_finds_inputs_and_outputs_by_name(exported: Any) -> None:
    config = inference.Config(
        str(exported.output / "model.json"), str(exported.output / "model.pdiparams")
    )
    config.disable_gpu()
    config.disable_mkldnn()
    config.disable_glog_info()
    predictor = inference.create_predictor(config)
    signature = exported.manifest.signature
    assert predictor.get_input_names() == signature.input_names
    assert predictor.get_output_names() == signature.output_names
    feeds = feeds_of(signature)
    for name, array in feeds.items():
        predictor.get_input_handle(name).copy_from_cpu(array)
    predictor.run()
    logits = predictor.get_output_handle(LOGITS).copy_to_cpu()
    np.testing.assert_array_equal(logits, PaddleRunner(exported.output).run(feeds)[LOGITS])


def test_jit_load_takes_inputs_and_gives_outputs_in_the_signatures_order(exported: Any) -> None:
    signature = exported.manifest.signature
    layer = paddle.jit.load(str(exported.output / "model"))
    feeds = feeds_of(signature, 4)
    outputs = layer(*[paddle.to_tensor(feeds[name]) for name in signature.input_names])
    wanted = PaddleRunner(exported.output).run(feeds)
    for name, output in zip(signature.output_names, outputs, strict=True):
        np.testing.assert_allclose(
            output.numpy(), wanted[name], atol=1e-5 * np.abs(wanted[name]).max()
        )


def test_generated_text_is_that_of_the_onnx_bundle(exported: Any, merged_bundle: Path) -> None:
    texts = [
        peft_deploy.load_bundle(bundle).generate(["he saw", "a"], max_new_tokens=9)
        for bundle in (exported.output, merged_bundle)
    ]
    assert [r.token_ids for r in texts[0]] == [r.token_ids for r in texts[1]]
    tokens, _ = plain_loop(merged_bundle, PROMPT, 5)
    assert len(set(tokens)) > 1  # no model that says one thing whatever it is asked


def test_validate_passes_and_sees_a_weight_that_changed(
    exported: Any, copied: Path, tiny_llama: Path, tiny_adapter: Path
) -> None:
    arguments = ["--base", str(tiny_llama), "--adapter", str(tiny_adapter)]
    good = CliRunner().invoke(cli, ["validate", str(exported.output), *arguments])
    assert good.exit_code == 0, good.output
    data = (copied / "model.pdiparams").read_bytes()
    table = np.frombuffer(data[-400:], np.float32) + 0.01  # the sines of the last positions
    (copied / "model.pdiparams").write_bytes(data[:-400] + table.astype(np.float32).tobytes())
    assert CliRunner().invoke(cli, ["validate", str(copied), *arguments]).exit_code == 7


def test_inspect_verifies_the_files(exported: Any, copied: Path) -> None:
    result = CliRunner().invoke(cli, ["inspect", str(exported.output), "--verify", "--json"])
    data = json.loads(result.stdout)
    assert data["format"] == "paddle" and data["problems"] == []
    program = (copied / "model.json").read_text("utf-8")
    (copied / "model.json").write_text(program.replace('"logits"', '"scores"'), "utf-8")
    result = CliRunner().invoke(cli, ["inspect", str(copied), "--json"])
    assert any("scores" in problem for problem in json.loads(result.stdout)["problems"])


def test_a_damaged_program_is_refused(copied: Path) -> None:
    (copied / "model.json").write_text('{"program": {}}', "utf-8")
    with pytest.raises(BundleError, match="not a program of Paddle's, or is damaged"):
        PaddleRunner(copied)


def test_weights_that_are_cut_off_are_refused(copied: Path) -> None:
    data = (copied / "model.pdiparams").read_bytes()
    (copied / "model.pdiparams").write_bytes(data[:-4])
    with pytest.raises(BundleError, match="cut off"):
        PaddleRunner(copied)


def test_weights_of_another_bundle_are_refused(copied: Path) -> None:
    program = json.loads((copied / "model.json").read_text("utf-8"))
    operators = program["program"]["regions"][0]["blocks"][0]["ops"]
    operators[:] = [op for op in operators if op["#"] != "p" or "q_proj" not in op["A"][3]]
    (copied / "model.json").write_text(json.dumps(program), "utf-8")
    with pytest.raises(BundleError, match=r"holds 23 tensors; model.json uses 21"):
        PaddleRunner(copied)


def test_missing_weights_are_refused(copied: Path) -> None:
    (copied / "model.pdiparams").unlink()
    with pytest.raises(BundleError, match="missing"):
        peft_deploy.load_bundle(copied)


def test_inputs_that_do_not_fit_are_refused(exported: Any) -> None:
    runner = PaddleRunner(exported.output)
    feeds = feeds_of(runner.signature)
    with pytest.raises(ExecutionError, match="position_ids"):
        runner.run({n: a for n, a in feeds.items() if n != "position_ids"})
    with pytest.raises(ExecutionError, match="no such outputs"):
        runner.run(feeds, ["scores"])
    with pytest.raises(ExecutionError, match="must be int64"):
        runner.run({**feeds, "input_ids": feeds["input_ids"].astype(np.int32)})


@pytest.mark.skipif(paddle.is_compiled_with_cuda(), reason="this Paddle has CUDA")
def test_cuda_needs_a_paddle_that_has_it(exported: Any) -> None:
    with pytest.raises(ExecutionError, match="no CUDA device"):
        PaddleRunner(exported.output, provider="cuda")
    with pytest.raises(ConfigError, match="'tpu' is unknown"):
        PaddleRunner(exported.output, provider="tpu")
    with pytest.raises(ConfigError, match="0 threads"):
        PaddleRunner(exported.output, threads=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "tflite"}, "'tflite' is unknown; it can be onnx or paddle"),
        ({"format": "paddle", "opset": 13}, "opset 13 was asked for"),
        ({"format": "paddle", "fuse": "onnx"}, "puts ONNX's operators together"),
        ({"fuse": "all"}, "fuse 'all' is unknown; it can be none, onnx, ort"),
        ({"fuse": "onnx", "opset": 17}, "--fuse onnx makes operators of opset 23, and opset 17"),
        ({"fuse": "none", "opset": 23}, "opset 23 is for fused graphs"),
        ({"opset": 22}, "opset 22 cannot be made; choose 13 to 21, or 23"),
        ({"format": "paddle", "adapters": "runtime"}, "Paddle's static format does not have"),
        ({"format": "paddle", "prefix_slots": True}, "Paddle's static format does not have"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExportOptions(**options)
