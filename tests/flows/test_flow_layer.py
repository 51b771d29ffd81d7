# ruff: noqa: E402 (the environment has to be prepared before Paddle's first import)
"""Models that no family knows, exported by their own forward with a signature that the user gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from peft_deploy.environment import require_paddle

require_paddle("these tests")

import onnx_ir as ir
import paddle
from flows_layers import SIGNATURE, make_net, with_lora
from model_recipes import load_recipe
from paddlenlp.transformers import ElectraConfig, ElectraForSequenceClassification

import peft_deploy
from peft_deploy.bundle import Manifest
from peft_deploy.cli import cli
from peft_deploy.config.export import ExportOptions
from peft_deploy.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    ConversionError,
    ExecutionError,
    TraceError,
    UnsupportedModelError,
    UnsupportedOperatorError,
)
from peft_deploy.parity.stored_weights import stored_in_onnx
from peft_deploy.runtime import OnnxRunner, open_runner

pytestmark = pytest.mark.convert

TARGETS = ["embedding", "conv", "head"]
PADDLE = ExportOptions(format="paddle")
TEXT = {
    "inputs": [
        {"name": n, "dtype": "int64", "dims": ["batch", "sequence"], "range": [0, top]}
        for n, top in (("input_ids", 61), ("token_type_ids", 2))
    ],
    "outputs": ["logits"],
}


@pytest.fixture(scope="module")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A bundle of a layer with LoRA, and the model."""
    model = with_lora(make_net(), TARGETS)
    model.train()
    output = tmp_path_factory.mktemp("layer") / "onnx"
    return peft_deploy.export(model, output, signature=SIGNATURE), model


@pytest.fixture(scope="module")
def electra(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A folder of PaddleNLP's with a model that no family claims, an adapter, and a signature."""
    folder = tmp_path_factory.mktemp("electra")
    paddle.seed(2)
    config = ElectraConfig(
        vocab_size=61,
        embedding_size=20,
        hidden_size=28,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=36,
        max_position_embeddings=40,
        num_labels=3,
    )
    model = ElectraForSequenceClassification(config)
    model.eval()
    model.save_pretrained(folder / "base")
    adapted = with_lora(model, [".*q_proj", ".*v_proj", ".*linear1"])
    adapted.save_pretrained(folder / "adapter")
    (folder / "signature.json").write_text(json.dumps(TEXT), "utf-8")
    return folder / "base", folder / "adapter", folder / "signature.json"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def test_the_graph_is_the_layers_with_the_adapter_merged(onnx: Any) -> None:
    result, _ = onnx
    assert result.parity.passed and not result.parity.warnings
    assert len(result.parity.cases) == 7
    assert result.parity.effect.sensitivity < 0.01
    spec = {s.name: s.dims for s in result.manifest.signature.outputs}
    assert spec["logits"] == ("batch", "sequence", 7) and spec["best"] == ("batch", "sequence")
    assert (result.manifest.model_type, result.manifest.architecture) == ("layer", "Net")
    (adapter,) = result.manifest.adapters
    assert (adapter["mode"], adapter["targets"]) == ("merged", sorted(TARGETS))
    names = list(ir.load(result.output / "model.onnx").graph.initializers)
    assert {"embedding.weight", "conv.weight", "norm._mean", "order"} <= set(names)
    assert not [name for name in names if "lora" in name or "unused" in name]


def test_results_are_those_of_the_layer_itself(onnx: Any) -> None:
    result, model = onnx
    rng = np.random.default_rng(9)
    feeds = {
        "ids": rng.integers(0, 31, (2, 7)),
        "mask": rng.integers(0, 2, (2, 7)).astype(bool),
        "weight": np.ones((2, 1, 1), np.float32),
    }
    model.eval()
    with paddle.no_grad():
        wanted = model(*[paddle.to_tensor(feeds[n]) for n in ("ids", "weight", "mask")])
    results = OnnxRunner(result.output).run(feeds)
    for name in SIGNATURE["outputs"]:
        np.testing.assert_allclose(results[name], wanted[name].numpy(), atol=1e-4)
    np.testing.assert_array_equal(results["ids_again"], feeds["ids"])


def test_paddles_format_has_the_same_signature_and_weights(onnx: Any, tmp_path: Path) -> None:
    result, model = onnx
    before = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    model.train()
    ours = peft_deploy.export(model, tmp_path / "out", signature=SIGNATURE, options=PADDLE)
    assert ours.parity is not None and ours.parity.passed
    assert ours.manifest.signature == result.manifest.signature
    assert ours.manifest.base == result.manifest.base
    assert model.training and model.model.norm.training and not model.merged
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), before[name])
    layer = paddle.jit.load(str(tmp_path / "out" / "model"))
    feeds = {
        "ids": np.arange(6).reshape(2, 3),
        "mask": np.ones((2, 3), bool),
        "weight": np.full((2, 1, 1), 1.5, np.float32),
    }
    loaded = layer(*[paddle.to_tensor(a) for a in feeds.values()])
    for name, output in open_runner(tmp_path / "out").run(feeds).items():
        value = loaded[SIGNATURE["outputs"].index(name)].numpy()
        np.testing.assert_allclose(value, output, atol=1e-5)


def test_a_merged_model_gives_the_same_weights(onnx: Any, tmp_path: Path) -> None:
    _, model = onnx
    options = ExportOptions(format="paddle", validate=False)
    first = peft_deploy.export(model, tmp_path / "first", signature=SIGNATURE, options=options)
    model.merge()
    try:
        second = peft_deploy.export(
            model, tmp_path / "second", signature=SIGNATURE, options=options
        )
    finally:
        model.unmerge()
    assert first.manifest is not None and second.manifest is not None
    assert first.manifest.files == second.manifest.files


def test_a_bit_that_no_case_sees_fails_the_check(onnx: Any, tmp_path: Path) -> None:
    """The biases are not merged, so they are the layer's to the last bit."""
    result, model = onnx
    folder = tmp_path / "bundle"
    shutil.copytree(result.output, folder)
    bias = stored_in_onnx(folder / "model.onnx")["conv.bias"]
    with bias.path.open("r+b") as file:
        file.seek(bias.offset)
        low = file.read(1)[0]
        file.seek(bias.offset)
        file.write(bytes([low ^ 1]))
    report = peft_deploy.validate(folder, model)
    (failed,) = [case for case in report.cases if not case.passed]
    assert failed.name == "weights, byte by byte"
    assert "conv.bias: 1 of 4 numbers differ" in (failed.problem or "")


def test_a_weight_that_is_not_the_layers_is_named(onnx: Any, tmp_path: Path) -> None:
    result, model = onnx
    folder = tmp_path / "bundle"
    shutil.copytree(result.output, folder)
    graph = ir.load(folder / "model.onnx")
    graph.graph.initializers["conv.bias"].name = "conv.bias_of_others"
    ir.save(graph, folder / "model.onnx")
    report = peft_deploy.validate(folder, model)
    (failed,) = [case for case in report.cases if not case.passed]
    assert "conv.bias_of_others: the layer has no such weight" in (failed.problem or "")


def test_validate_takes_the_layer_and_sees_another_one(onnx: Any) -> None:
    result, model = onnx
    assert peft_deploy.validate(result.output, model, seed=4).passed
    with pytest.raises(AdapterError, match="was made with default"):
        peft_deploy.validate(result.output, make_net())
    with pytest.raises(CheckpointError, match="fingerprint"):
        peft_deploy.validate(result.output, with_lora(make_net(seed=1), TARGETS))


@pytest.mark.parametrize("asked", [{"fuse": "ort"}, {"opset": 23}])
def test_a_layer_that_stays_plain_though_fusing_was_asked_for_says_so(
    asked: dict[str, Any], tmp_path: Path
) -> None:
    ((option, value),) = asked.items()
    with pytest.warns(
        UserWarning, match=rf"--{option} {value} was asked for.*opset 21.*\n.*Batch"
    ):
        result = peft_deploy.export(
            make_net(),
            tmp_path / "out",
            signature=SIGNATURE,
            options=ExportOptions(**asked, validate=False),
        )
    assert result.manifest is not None and result.manifest.opset == 21


def test_operators_that_do_not_convert_are_named_before_anything_is_written(
    tmp_path: Path,
) -> None:
    class Gated(paddle.nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.up = paddle.nn.Linear(4, 4)

        def forward(self, x: Any) -> Any:
            return paddle.incubate.nn.functional.swiglu(self.up(x))

    said = {
        "inputs": [{"name": "x", "dtype": "float32", "dims": ["batch", 4]}],
        "outputs": ["y"],
    }
    with pytest.raises(UnsupportedOperatorError, match=r"swiglu in the model.*test_flow_layer.py"):
        peft_deploy.export(Gated(), tmp_path / "out", signature=said)
    assert not list(tmp_path.iterdir())
    result = peft_deploy.export(Gated(), tmp_path / "out", signature=said, options=PADDLE)
    assert result.parity is not None and result.parity.passed  # Paddle has it


def test_paddles_format_needs_weights(tmp_path: Path) -> None:
    said = {
        "inputs": [{"name": "x", "dtype": "float32", "dims": ["batch", 4]}],
        "outputs": ["y"],
    }
    with pytest.raises(ConversionError, match="ReLU computes without any weights"):
        peft_deploy.export(paddle.nn.ReLU(), tmp_path / "out", signature=said, options=PADDLE)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_an_unclaimed_model_goes_through_the_command_line(
    electra: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, adapter, signature = electra
    lost = run("export", "--base", base, "--output", tmp_path / "out")
    assert lost.exit_code == 4 and "--signature FILE" in lost.stderr
    arguments = ("--base", base, "--adapter", adapter, "--merge", "--signature", signature)
    dry = run("export", *arguments, "--output", tmp_path / "out", "--dry-run")
    assert dry.exit_code == 0 and "by its own forward" in dry.stderr
    assert not (tmp_path / "out").exists()
    made = run("export", *arguments, "--output", tmp_path / "out", "--format", "paddle", "--json")
    assert made.exit_code == 0, made.stderr
    assert json.loads(made.stdout)["parity"]["passed"] is True
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.architecture == "ElectraForSequenceClassification"
    assert manifest.adapters[0]["name"] == "adapter"
    checked = run("validate", tmp_path / "out", "--base", base, "--adapter", adapter)
    assert checked.exit_code == 0, checked.stderr
    without = run("validate", tmp_path / "out", "--base", base)
    assert without.exit_code == 3 and "none was given" in without.stderr


def changed(folder: Path, base: Path, **entries: Any) -> Path:
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((base / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **entries}), "utf-8")
    return folder


@pytest.mark.parametrize(
    ("entries", "error", "message"),
    [
        ({"architectures": ["ElectroModel"]}, UnsupportedModelError, "no such model"),
        ({"architectures": ["ElectraTokenizer"]}, UnsupportedModelError, "no such model"),
        ({"num_hidden_layers": 3}, CheckpointError, r"missing:\n.*layers\.2"),
        ({"num_hidden_layers": 1}, CheckpointError, r"not expected:\n.*layers\.1"),
        ({"vocab_size": 62}, CheckpointError, r"the model's is \[62, 20\]"),
        ({"hidden_size": "wide"}, UnsupportedModelError, "cannot make a Electra"),
    ],
)
def test_folders_that_are_refused(
    entries: dict[str, Any],
    error: type[Exception],
    message: str,
    electra: tuple[Path, Path, Path],
    tmp_path: Path,
) -> None:
    base = changed(tmp_path / "base", electra[0], **entries)
    with pytest.raises(error, match=message):
        peft_deploy.export(base, tmp_path / "out", signature=electra[2], options=PADDLE)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("signature", "options", "error", "message"),
    [
        (
            {**SIGNATURE, "outputs": ["logits", "best", "mean"]},
            {},
            TraceError,
            "returns 4 tensors",
        ),
        (
            {**SIGNATURE, "inputs": SIGNATURE["inputs"][:1]},
            {},
            ExecutionError,
            "Net does not take ids",
        ),
        (
            {
                **SIGNATURE,
                "inputs": [{**SIGNATURE["inputs"][0], "range": [0, 40]}, *SIGNATURE["inputs"][1:]],
            },
            {},
            ExecutionError,
            "Net does not take ids",
        ),
        ("no-such-file.json", {}, ConfigError, "is no file"),
        (SIGNATURE, {"adapters": "runtime"}, ConfigError, "--adapters runtime needs to know"),
        (SIGNATURE, {"prefix_slots": True}, ConfigError, "--prefix-slots needs to know"),
        (SIGNATURE, {"last_logits": True}, ConfigError, "--last-logits needs to know"),
        (SIGNATURE, {"precision": "fp16"}, ConfigError, "--precision fp16 needs to know"),
        (SIGNATURE, {"validate_layers": 2}, ConfigError, "--validate-layers needs to know"),
        (SIGNATURE, {"pooling": "mean"}, ConfigError, "--pooling needs to know"),
    ],
)
def test_what_does_not_fit_the_layer_is_refused_before_anything_is_written(
    signature: Any, options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        peft_deploy.export(
            make_net(), tmp_path / "out", signature=signature, options=ExportOptions(**options)
        )
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_known_needs_no_signature(tmp_path: Path) -> None:
    base = load_recipe("tiny").make(tmp_path / "base", "bert-classification")
    said = {**TEXT, "outputs": ["logits"]}
    with pytest.raises(ConfigError) as caught:
        peft_deploy.export(
            base, tmp_path / "out", signature=said, options=ExportOptions(prefix_slots=True)
        )
    assert caught.value.hint == "leave --signature out: BertForSequenceClassification is known"
    with pytest.warns(UserWarning, match="BertForSequenceClassification is a model that is known"):
        peft_deploy.export(
            base, tmp_path / "out", signature=said, options=ExportOptions(dry_run=True)
        )


def test_models_in_memory_bring_their_own_adapter(
    electra: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="brings its own adapter"):
        peft_deploy.export(make_net(), tmp_path / "out", adapter=electra[1], signature=SIGNATURE)
    disabled = with_lora(make_net(), TARGETS)
    disabled.disable_lora()
    with pytest.raises(AdapterError, match="disabled"):
        peft_deploy.export(disabled, tmp_path / "out", signature=SIGNATURE)
