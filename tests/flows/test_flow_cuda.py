"""The whole check on ONNX Runtime's CUDA provider; skipped, visibly, where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
from model_recipes import load_recipe

import peft_deploy
from peft_deploy.config.export import RUNTIME, ExportOptions
from peft_deploy.runtime import OnnxRunner
from peft_deploy.runtime.onnx_runner import EXECUTION_PROVIDERS

CUDA = EXECUTION_PROVIDERS["cuda"]

pytestmark = [pytest.mark.gpu, pytest.mark.convert]


@pytest.fixture(autouse=True)
def cuda() -> None:
    ort = pytest.importorskip("onnxruntime")
    if CUDA not in ort.get_available_providers():
        pytest.skip(f"onnxruntime has no {CUDA} here")


@pytest.mark.parametrize("kept", [False, True], ids=["merged", "at run time"])
@pytest.mark.parametrize(
    "model", ["llama", "gemma", "gpt", "opt", "bloom", "qwen2", "bert-embedding"]
)
def test_the_matrix_holds_on_cuda(model: str, kept: bool, tmp_path: Path) -> None:
    recipe = load_recipe("tiny")
    base = recipe.make(tmp_path / "base", model)
    recipe.make_lora(tmp_path / "lora", base, seed=7)
    options = ExportOptions(merge=not kept, adapters=RUNTIME if kept else None, validate=False)
    peft_deploy.export(base, tmp_path / "out", adapter=tmp_path / "lora", options=options)
    report = peft_deploy.validate(
        tmp_path / "out", base, adapter=tmp_path / "lora", provider="cuda"
    )
    assert report.passed, report.summary()
    assert report.provider == "cuda"


def test_nodes_run_there_and_the_others_are_named(tmp_path: Path) -> None:
    base = load_recipe("tiny").make(tmp_path / "base", "llama")
    peft_deploy.export(base, tmp_path / "out", options=ExportOptions(validate=False))
    placement = OnnxRunner(tmp_path / "out", provider="cuda").placement
    assert placement is not None
    products = {node.provider for node in placement.nodes if node.operator in ("MatMul", "Gemm")}
    assert products == {CUDA}
    assert all(node.name in str(placement) for node in placement.elsewhere[:1])
