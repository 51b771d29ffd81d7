"""From folders to a bundle, and what the bundle computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from flows_adapter import adapter_for
from flows_loops import node_names, paddle_loop, plain_loop, session

import peft_deploy
from peft_deploy.base import open_base
from peft_deploy.base.dygraph import load_model
from peft_deploy.bundle import Manifest
from peft_deploy.config.export import ExportOptions
from peft_deploy.signature import past_names
from peft_deploy.text import Tokenizer

pytestmark = pytest.mark.convert

PROMPT = [3, 17, 5, 9, 40, 2, 33]
FILES = {
    "config.json",
    "genai_config.json",
    "model.onnx",
    "model.onnx.data",
    "peft_deploy.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def test_bundle_has_the_files_of_its_format(merged_bundle: Path) -> None:
    names = {p.name for p in merged_bundle.iterdir()}
    assert names >= FILES
    assert set(Manifest.read(merged_bundle).files) == names - {"peft_deploy.json"}


def test_greedy_tokens_are_those_of_paddle_with_the_adapter_active(
    tiny_llama: Path, tiny_adapter: Path, merged_bundle: Path
) -> None:
    model = load_model(open_base(tiny_llama))
    base_tokens, _ = paddle_loop(model, PROMPT, 16)
    tuned = peft_deploy.LoRAModel.from_pretrained(model, tiny_adapter).eval()
    want_tokens, want = paddle_loop(tuned, PROMPT, 16)
    got_tokens, got = plain_loop(merged_bundle, PROMPT, 16)
    assert got_tokens == want_tokens
    assert got_tokens != base_tokens
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_merged_graph_is_the_base_models_own_graph(base_bundle: Path, merged_bundle: Path) -> None:
    assert node_names(merged_bundle) == node_names(base_bundle)


def test_the_adapter_is_in_the_weights(base_bundle: Path, merged_bundle: Path) -> None:
    _, base = plain_loop(base_bundle, PROMPT, 1)
    _, merged = plain_loop(merged_bundle, PROMPT, 1)
    assert np.abs(merged[0] - base[0]).max() > 0.1 * np.abs(base[0]).max()


def test_parity_is_recorded_and_passed(merged_bundle: Path) -> None:
    manifest = Manifest.read(merged_bundle)
    assert manifest.parity is not None
    assert manifest.parity["passed"] is True
    (adapter,) = manifest.adapters
    assert (adapter["mode"], adapter["rank"], adapter["scaling"]) == ("merged", 5, 2.0)
    assert len(adapter["targets"]) == 14


@pytest.mark.parametrize(
    "form",
    [
        {"layout": "paddlenlp"},
        {"container": "sharded-safetensors"},
        {"layout": "paddlenlp", "container": "pdparams"},
        {"layout": "paddlenlp", "container": "sharded-pdparams"},
    ],
    ids=lambda form: "-".join(form.values()),
)
def test_the_bundle_is_the_same_whatever_form_the_base_has(
    form: dict[str, str],
    make_tiny_llama: Any,
    tiny_adapter: Path,
    merged_bundle: Path,
    tmp_path: Path,
) -> None:
    base = make_tiny_llama(**form)
    peft_deploy.export(
        base, tmp_path / "out", adapter=tiny_adapter, options=ExportOptions(validate=False)
    )
    ours, theirs = Manifest.read(tmp_path / "out"), Manifest.read(merged_bundle)
    for file in ("model.onnx", "model.onnx.data"):
        assert ours.files[file] == theirs.files[file]
    assert ours.base["fingerprint"] == theirs.base["fingerprint"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_and_tied_bases_pass_the_check(
    dtype: str, make_tiny_llama: Any, tmp_path: Path
) -> None:
    base = make_tiny_llama(dtype=dtype, tied=True)
    result = peft_deploy.export(
        base, tmp_path / "out", adapter=adapter_for(base, tmp_path / "adapter")
    )
    assert result.parity is not None and result.parity.passed
    graph = ir.load(tmp_path / "out" / "model.onnx").graph
    assert "model.embed_tokens.weight" in graph.initializers
    assert "lm_head.weight" not in graph.initializers


@pytest.mark.parametrize("opset", [13, 21])
def test_other_opsets_pass_the_check(
    opset: int, tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    result = peft_deploy.export(
        tiny_llama, tmp_path / "out", adapter=tiny_adapter, options=ExportOptions(opset=opset)
    )
    assert result.parity is not None and result.parity.passed
    assert ir.load(tmp_path / "out" / "model.onnx").opset_imports[""] == opset
    assert result.manifest is not None
    assert "fused" not in result.manifest.graph  # the operators are of a later set


def test_plain_graphs_are_of_opset_17(tiny_llama: Path, tmp_path: Path) -> None:
    options = ExportOptions(fuse="none")
    result = peft_deploy.export(tiny_llama, tmp_path / "out", options=options)
    assert result.parity is not None and result.parity.passed
    assert result.manifest is not None and result.manifest.opset == 17
    assert ir.load(tmp_path / "out" / "model.onnx").opset_imports[""] == 17


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_scaling_type": "ntk", "rope_scaling_factor": 2.0},
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ],
    ids=["linear", "ntk", "llama3"],
)
def test_scaled_rotary_positions_pass_the_check(
    scaling: dict[str, Any], make_tiny_llama: Any, tmp_path: Path
) -> None:
    base = make_tiny_llama()
    config = json.loads((base / "config.json").read_text("utf-8"))
    (base / "config.json").write_text(json.dumps({**config, **scaling}), "utf-8")
    result = peft_deploy.export(base, tmp_path / "out")
    assert result.parity is not None and result.parity.passed


def test_weights_are_external_and_inside_the_folder(merged_bundle: Path) -> None:
    graph = ir.load(merged_bundle / "model.onnx").graph
    tensors = [v.const_value for v in graph.initializers.values()]
    external = [t for t in tensors if isinstance(t, ir.ExternalTensor)]
    assert {t.location for t in external} == {"model.onnx.data"}
    linears = 2 * 4  # of two layers: queries, keys and values are one, and gate and up
    assert len(external) == linears + 5 + 2 + 2  # norms, embedding and head, rotary tables
    assert all(t.dtype == ir.DataType.INT64 or t.size == 1 for t in tensors if t not in external)


def test_interface_names_and_dimensions(merged_bundle: Path) -> None:
    run = session(merged_bundle)
    inputs = {i.name: i.shape for i in run.get_inputs()}
    assert list(inputs) == ["input_ids", "attention_mask", "position_ids", *past_names(2)]
    assert inputs["attention_mask"] == ["batch", "past+sequence"]
    assert inputs["past_key_values.1.value"] == ["batch", 2, "past", 8]
    text = (merged_bundle / "model.onnx").read_bytes()
    assert b"DynamicDimension" not in text and b"p2o." not in text


def test_genai_config_has_only_known_keys(merged_bundle: Path) -> None:
    config = json.loads((merged_bundle / "genai_config.json").read_text("utf-8"))
    assert set(config) == {"model", "search"}
    assert config["model"]["vocab_size"] == 131
    assert config["search"]["past_present_share_buffer"] is False


@pytest.mark.parametrize(("configured", "ends"), [(None, [2]), ([3, 7], [3, 7, 2])])
def test_genai_stops_where_generate_stops(
    configured: list[int] | None, ends: list[int], tiny_llama: Path, tmp_path: Path
) -> None:
    """At the tokenizer's own end token, too, which the configuration need not name."""
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    for name in ("config.json", "generation_config.json"):
        config = json.loads((base / name).read_text("utf-8"))
        (base / name).write_text(json.dumps({**config, "eos_token_id": configured}), "utf-8")
    peft_deploy.export(base, tmp_path / "out", options=ExportOptions(validate=False))
    genai = json.loads((tmp_path / "out" / "genai_config.json").read_text("utf-8"))
    assert genai["model"]["eos_token_id"] == ends
    assert set(Tokenizer.from_folder(tmp_path / "out").eos_ids) == set(ends)


def test_a_model_in_memory_gives_the_same_bundle_and_is_left_alone(
    tiny_llama: Path, tiny_adapter: Path, merged_bundle: Path, tmp_path: Path
) -> None:
    model = peft_deploy.LoRAModel.from_pretrained(load_model(open_base(tiny_llama)), tiny_adapter)
    model.train()
    before = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    result = peft_deploy.export(model, tmp_path / "out", tokenizer=tiny_llama)
    assert result.parity is not None and result.parity.passed
    ours, theirs = Manifest.read(tmp_path / "out"), Manifest.read(merged_bundle)
    assert ours.files["model.onnx.data"] == theirs.files["model.onnx.data"]
    assert ours.base["fingerprint"] == theirs.base["fingerprint"]
    assert model.training and not model.merged
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), before[name])


def test_a_merged_model_in_memory_gives_the_same_bundle(
    tiny_llama: Path, tiny_adapter: Path, merged_bundle: Path, tmp_path: Path
) -> None:
    model = peft_deploy.LoRAModel.from_pretrained(load_model(open_base(tiny_llama)), tiny_adapter)
    model.merge()
    peft_deploy.export(model, tmp_path / "out")
    ours, theirs = Manifest.read(tmp_path / "out"), Manifest.read(merged_bundle)
    assert ours.files["model.onnx.data"] == theirs.files["model.onnx.data"]
    assert model.merged


def test_whole_tensors_of_an_adapter_take_the_bases_place(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """A norm and the head, trained beside LoRA (``trainable_modules``)."""
    import paddle

    config = peft_deploy.LoRAConfig(
        r=3, lora_alpha=6, target_modules=["q_proj"], trainable_modules=["lm_head", "llama.norm"]
    )
    model = peft_deploy.LoRAModel(load_model(open_base(tiny_llama)), config).eval()
    for name, tensor in model.get_trainable_state_dict().items():
        start = 0.0 if "lora" in name else tensor
        tensor.set_value(start + 0.3 * paddle.randn(tensor.shape))
    model.save_pretrained(tmp_path / "adapter")
    result = peft_deploy.export(tiny_llama, tmp_path / "out", adapter=tmp_path / "adapter")
    assert result.parity is not None and result.parity.passed
    assert result.manifest is not None
    (entry,) = result.manifest.adapters
    assert entry["replaced"] == ["llama.norm.weight", "lm_head.weight"]
    want_tokens, want = paddle_loop(model, PROMPT, 4)
    got_tokens, got = plain_loop(tmp_path / "out", PROMPT, 4)
    assert got_tokens == want_tokens
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
