"""A missing extra is one sentence and exit code 2. In processes where the packages cannot be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from peft_deploy.adapters.formats import write_adapter
from peft_deploy.bundle import MANIFEST, MODEL, Manifest
from peft_deploy.config import LoRAConfig
from peft_deploy.signature import causal_lm_signature

PADDLE = ("paddle", "paddlenlp", "paddle2onnx", "onnxscript")

# A finder that is asked before all others, and the command line.
PROGRAM = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

BLOCKED = set(sys.argv.pop(1).split(","))
sys.meta_path.insert(0, Blocker())
from peft_deploy.cli import main
main()
"""


def run(blocked: tuple[str, ...], *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, ",".join(blocked), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def assert_one_sentence(
    result: subprocess.CompletedProcess[str], package: str, extra: str
) -> None:
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert f"needs the package {package}, which is not installed" in errors[0]
    assert f"pip install 'peft-deploy[{extra}]'" in result.stderr


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "examples.jsonl"
    file.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n", "utf-8")
    return file


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole as far as can be seen without a runtime."""
    folder = tmp_path_factory.mktemp("bundle")
    signature = causal_lm_signature(num_layers=1, num_kv_heads=1, head_dim=8, vocab_size=67)
    manifest = Manifest(
        versions={},
        model_type="llama",
        architecture="LlamaForCausalLM",
        signature=signature,
        opset=17,
        precision="fp32",
        base={"name": "b", "layout": "huggingface", "fingerprint": "00"},
    )
    (folder / MANIFEST).write_text(manifest.to_json(), "utf-8")
    (folder / MODEL).write_bytes(b"")
    return folder


def test_export_without_paddle(tiny_llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = run(PADDLE, "export", "--base", tiny_llama, "--output", output)
    assert_one_sentence(result, "paddle", "paddle")
    assert not list(tmp_path.iterdir())


def test_train_without_paddle(tiny_llama: Path, examples: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = run(PADDLE, "train", "--base", tiny_llama, "--data", examples, "--output", output)
    assert_one_sentence(result, "paddle", "paddle")
    assert not list(tmp_path.iterdir())


def test_generate_without_a_runtime(bundle: Path) -> None:
    result = run(("onnxruntime", *PADDLE), "generate", bundle, "--prompt", "x")
    assert_one_sentence(result, "onnxruntime", "cpu")


def test_a_missing_extra_as_json(tiny_llama: Path, tmp_path: Path) -> None:
    result = run(PADDLE, "export", "--base", tiny_llama, "--output", tmp_path / "o", "--json")
    assert result.returncode == 2
    assert json.loads(result.stdout)["error"] == "MissingExtraError"


def test_inspect_needs_no_extra(tiny_llama: Path, tmp_path: Path) -> None:
    blocked = ("onnxruntime", "onnx", *PADDLE)
    A, B = np.ones((4, 2), np.float32), np.full((2, 3), 0.5, np.float32)
    config = LoRAConfig(r=2, target_modules=".*q_proj")
    tensors = {"llama.layers.0.self_attn.q_proj.lora_A": A}
    tensors["llama.layers.0.self_attn.q_proj.lora_B"] = B
    write_adapter(tmp_path / "adapter", config, tensors)
    for path, kind in ((tiny_llama, "checkpoint"), (tmp_path / "adapter", "adapter")):
        result = run(blocked, "inspect", path, "--json")
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["kind"] == kind


def test_doctor_says_what_cannot_be_imported() -> None:
    result = run(("onnxruntime", *PADDLE), "doctor", "--no-convert", "--json")
    assert result.returncode == 2, result.stderr
    data = json.loads(result.stdout)
    failed = {check["title"] for check in data["checks"] if check["verdict"] == "failed"}
    assert failed == {"execution providers", "run on cpu"}
