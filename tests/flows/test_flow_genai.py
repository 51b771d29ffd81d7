"""Bundles in onnxruntime-genai as it is: base, merged, adapters and prefixes; the tokens are ours."""

from __future__ import annotations

from pathlib import Path

import pytest
from flows_adapter import adapter_for
from flows_genai import Genai, needs_genai, ours
from flows_prefix import prefix_by_us

import peft_deploy
from peft_deploy.adapters.formats.onnx_file import (
    OnnxAdapterFile,
    read_onnx_file,
    write_onnx_adapter,
)
from peft_deploy.config.export import ExportOptions
from peft_deploy.runtime import Session

pytestmark = [
    pytest.mark.convert,
    needs_genai,
]

RAGGED = [[3, 17, 5, 9, 40, 33], [8, 5, 6], [40, 99, 33, 7, 1, 9, 12, 4]]
STEPS = 14
FILES = ("tuned", "small", "poet")


@pytest.fixture(scope="module")
def bundle(tiny_llama: Path, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slots for LoRA and for a prefix; two adapters of different rank, and a prefix."""
    root = tmp_path_factory.mktemp("genai")
    small = adapter_for(tiny_llama, root / "small", rank=2, seed=3)
    poet = prefix_by_us(tiny_llama, root / "poet")
    peft_deploy.export(
        tiny_llama,
        root / "bundle",
        adapter=[f"tuned={tiny_adapter}", f"small={small}", f"poet={poet}"],
        options=ExportOptions(adapters="runtime", prefix_slots=True, validate=False),
    )
    both = {
        name: array
        for file in ("small", "poet")
        for name, array in _file(root / "bundle", file).tensors.items()
    }
    version = _file(root / "bundle", "small").model_version
    write_onnx_adapter(root / "both.onnx_adapter", both, version)
    return root / "bundle"


def _file(bundle: Path, name: str) -> OnnxAdapterFile:
    return read_onnx_file(bundle / "adapters" / f"{name}.onnx_adapter")


def test_base_and_merged_bundles(base_bundle: Path, merged_bundle: Path) -> None:
    found = []
    for folder in (base_bundle, merged_bundle):
        genai, session = Genai(folder), Session(folder)
        for prompts in (RAGGED[:1], RAGGED):
            want = ours(session, prompts, STEPS, genai.ends)
            assert genai.tokens(prompts, STEPS) == want
        found.append(want)
    assert found[0] != found[1]


def test_adapters_and_prefixes_by_og_adapters(bundle: Path, merged_bundle: Path) -> None:
    genai, session = Genai(bundle), Session(bundle)
    for name in FILES:
        genai.load(bundle / "adapters" / f"{name}.onnx_adapter")
        session.load_adapter(name)
    genai.load(bundle.parent / "both.onnx_adapter")
    seen = [genai.tokens(RAGGED, STEPS)]
    assert seen[0] == ours(session, RAGGED, STEPS, genai.ends)
    for name in FILES:
        for prompts in (RAGGED[:1], RAGGED):
            want = ours(session, prompts, STEPS, genai.ends, adapter=name)
            assert genai.tokens(prompts, STEPS, name) == want
        seen.append(want)
    together = ours(session, RAGGED, STEPS, genai.ends, adapter=["small", "poet"])
    assert genai.tokens(RAGGED, STEPS, ["small", "poet"]) == together
    assert genai.tokens(RAGGED, STEPS, "both") == together
    seen.append(together)
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])
    merged = Session(merged_bundle)
    assert seen[FILES.index("tuned") + 1] == ours(merged, RAGGED, STEPS, genai.ends)
    poet = ours(session, RAGGED, STEPS, genai.ends, prefix="poet")
    assert seen[FILES.index("poet") + 1] == poet
    assert genai.tokens(RAGGED, STEPS) == seen[0]  # without one again
