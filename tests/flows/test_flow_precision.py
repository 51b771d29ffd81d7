"""Bundles in 16 bits, from export to generation."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from model_recipes import load_recipe

import peft_deploy
from peft_deploy.bundle import MODEL, MODEL_DATA, Manifest
from peft_deploy.config.export import ExportOptions
from peft_deploy.environment import require_paddle
from peft_deploy.errors import ConfigError, ExecutionError, ParityError
from peft_deploy.runtime import GenerationOptions, Session, open_runner
from peft_deploy.weights.safetensors_file import SafetensorsFile

require_paddle("the reference")  # now: what it warns of when it is imported is no test's business
tiny = load_recipe("tiny")

pytestmark = pytest.mark.convert


@pytest.fixture(scope="module")
def bundle(tiny_llama: Path, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("half") / "fp16"
    options = ExportOptions(precision="fp16")
    peft_deploy.export(tiny_llama, output, adapter=tiny_adapter, options=options)
    return output


def test_a_bundle_in_fp16_passes_and_says_what_it_lost(bundle: Path, merged_bundle: Path) -> None:
    manifest = Manifest.read(bundle)
    assert manifest.precision == "fp16"
    assert {spec.dtype for spec in manifest.signature.past} == {"float16"}
    assert manifest.signature.outputs[0].dtype == "float32"
    assert manifest.parity is not None and manifest.parity["passed"] is True
    loss = manifest.parity["loss"]
    assert 0 < loss["kl"] < 1e-3
    assert loss["top1"] > 0.9
    assert loss["perplexity"] == pytest.approx(loss["perplexity_fp32"], rel=0.05)
    assert "float32" in manifest.graph["precision"]
    sizes = [(folder / MODEL_DATA).stat().st_size for folder in (bundle, merged_bundle)]
    assert sizes[0] < 0.6 * sizes[1]


def test_it_is_loaded_and_generates_as_any_other(bundle: Path, merged_bundle: Path) -> None:
    prompt = [3, 1, 4, 1, 5]
    tokens = []
    for folder in (bundle, merged_bundle):
        results = Session(folder).generate([prompt], GenerationOptions(max_new_tokens=4))
        tokens.append(list(results[0].token_ids))
    assert tokens[0] == tokens[1]


def with_one_weight_times(factor: float, bundle: Path, copy: Path) -> None:
    """A copy of a bundle, in which the second layer's down projection is multiplied by a number."""
    shutil.copytree(bundle, copy)
    weights = ir.load(copy / MODEL).graph.initializers
    tensor = weights["model.layers.1.mlp.down_proj.weight"].const_value
    assert isinstance(tensor, ir.ExternalTensor) and tensor.dtype == ir.DataType.FLOAT16
    shape = tuple(tensor.shape.numpy())
    data = np.memmap(copy / MODEL_DATA, np.float16, "r+", tensor.offset or 0, shape)
    data *= np.float16(factor)
    data.flush()


def test_one_weight_off_by_one_per_cent_is_found(
    bundle: Path, tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    with_one_weight_times(1.01, bundle, tmp_path / "changed")
    report = peft_deploy.validate(tmp_path / "changed", tiny_llama, adapter=tiny_adapter)
    assert not report.passed


def test_one_weight_off_by_a_third_is_located(
    bundle: Path, tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    with_one_weight_times(1.3, bundle, tmp_path / "changed")
    report = peft_deploy.validate(
        tmp_path / "changed", tiny_llama, adapter=tiny_adapter, bisect=tmp_path / "where"
    )
    assert report.finding is not None
    assert report.finding.module.endswith("layers.1.mlp.down_proj")
    assert "down_proj" in report.finding.weights[0].name


def test_another_adapter_than_the_reference_has_is_no_rounding(
    tiny_llama: Path, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The merge itself, which the rounded reference could not show, is compared before it is rounded."""
    from peft_deploy.weights import merged

    right = merged.merge_weight

    def scaled(*args: Any, **kwargs: Any) -> Any:
        base = np.asarray(args[0])
        return (base + 1.01 * (right(*args, **kwargs) - base)).astype(base.dtype)

    monkeypatch.setattr(merged, "merge_weight", scaled)
    with pytest.raises(ParityError, match="adapter"):
        peft_deploy.export(
            tiny_llama,
            tmp_path / "out",
            adapter=tiny_adapter,
            options=ExportOptions(precision="fp16"),
        )
    assert not (tmp_path / "out").exists()


def test_a_prefix_and_slots_are_of_the_graphs_type(
    tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    prefix = tiny.make_prefix(tmp_path / "prefix", tiny_llama)
    output = tmp_path / "out"
    peft_deploy.export(
        tiny_llama,
        output,
        adapter=[f"tuned={tiny_adapter}", f"poet={prefix}"],
        options=ExportOptions(precision="fp16", adapters="runtime"),
    )
    manifest = Manifest.read(output)
    assert manifest.parity is not None and manifest.parity["passed"] is True
    assert set(manifest.parity["parts"]) == {"adapter tuned", "prefix poet"}
    assert manifest.graph["lora_slots"]["dtype"] == "float16"
    file = SafetensorsFile(output / "prefixes" / "poet.safetensors")
    assert {file.info(name).dtype for name in file.names()} == {"float16"}


def test_bf16_is_exported_and_refused_where_it_cannot_run(
    tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="CPU") as caught:
        ExportOptions(precision="bf16")
    assert "--no-validate" in (caught.value.hint or "")
    output = tmp_path / "out"
    options = ExportOptions(precision="bf16", validate=False)
    peft_deploy.export(tiny_llama, output, options=options)
    types = {
        v.const_value.dtype
        for v in ir.load(output / MODEL).graph.initializers.values()
        if v.const_value
    }
    assert ir.DataType.BFLOAT16 in types
    assert ir.DataType.BFLOAT16.numpy() == ml_dtypes.bfloat16
    with pytest.raises(ExecutionError, match="bfloat16") as refused:
        open_runner(output)
    assert "cuda" in (refused.value.hint or "")
    with pytest.raises(ExecutionError, match="bfloat16"):
        peft_deploy.validate(output, tiny_llama)


@pytest.mark.parametrize("name", ["bert-embedding", "t5"])
def test_encoders_pass_in_fp16_too(name: str, tmp_path: Path) -> None:
    base = tiny.make(tmp_path / "base", name)
    peft_deploy.export(base, tmp_path / "out", options=ExportOptions(precision="fp16"))
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.parity is not None and manifest.parity["passed"] is True
    loss = manifest.parity["loss"]
    assert all(value > 0.999 for value in loss["cosine"].values())
    if manifest.encoder is not None:
        assert {spec.dtype for spec in manifest.encoder.signature.outputs} == {"float16"}


def test_paddles_format_has_no_other_precision() -> None:
    with pytest.raises(ConfigError, match="Paddle"):
        ExportOptions(precision="fp16", format="paddle")
    with pytest.raises(ConfigError, match="fp16"):
        ExportOptions(precision="half")
