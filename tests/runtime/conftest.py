from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import tiny_graph
import tiny_text

from peft_deploy.bundle.manifest import MANIFEST, Manifest
from peft_deploy.runtime import OnnxRunner


@pytest.fixture(scope="session")
def weights() -> dict[str, np.ndarray]:
    return tiny_graph.make_weights()


def write_bundle(folder: Path, weights: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tiny_graph.save_model(folder, weights)
    tiny_text.write_tokenizer(folder)
    config = {"max_position_embeddings": tiny_graph.MAX_POSITIONS, "eos_token_id": tiny_text.END}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    generation = {"eos_token_id": [tiny_text.END], "pad_token_id": tiny_text.PAD}
    (folder / "generation_config.json").write_text(json.dumps(generation), "utf-8")
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}
    manifest = Manifest(
        versions={},
        model_type="llama",
        architecture="LlamaForCausalLM",
        signature=tiny_graph.signature(),
        opset=17,
        precision="fp32",
        context_length=tiny_graph.MAX_POSITIONS,
        base={"name": "tiny"},
        files=files,
    )
    (folder / MANIFEST).write_text(manifest.to_json(), "utf-8")
    return folder


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, weights: dict[str, np.ndarray]) -> Path:
    return write_bundle(tmp_path_factory.mktemp("runtime") / "bundle", weights)


@pytest.fixture(scope="session")
def runner(bundle: Path) -> OnnxRunner:
    return OnnxRunner(bundle, threads=1)
