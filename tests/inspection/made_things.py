"""An adapter and a bundle, written to be inspected."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from peft_deploy.adapters.formats import write_adapter
from peft_deploy.bundle import MANIFEST, MODEL, MODEL_DATA, Manifest
from peft_deploy.bundle.folder import sha256
from peft_deploy.config import LoRAConfig
from peft_deploy.signature import GraphSignature, TensorSpec

RANK, ALPHA = 3, 12
MODULES = {
    "llama.layers.0.self_attn.q_proj": (48, 48),
    "llama.layers.1.self_attn.q_proj": (48, 48),
    "llama.layers.0.self_attn.v_proj": (48, 16),
}
SIGNATURE = GraphSignature(
    (TensorSpec("x", "float32", ("batch", 4)),), (TensorSpec("y", "float32", ("batch", 5)),)
)


def lora_tensors(seed: int = 3, B_scale: float = 0.4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tensors = {}
    for module, (into, out) in MODULES.items():
        tensors[f"{module}.lora_A"] = rng.standard_normal((into, RANK)).astype(np.float32)
        B = rng.standard_normal((RANK, out)) * B_scale
        tensors[f"{module}.lora_B"] = B.astype(np.float32)
    return tensors


def write_lora(folder: Path, tensors: dict[str, np.ndarray], **options: object) -> Path:
    config = LoRAConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=[".*q_proj", ".*v_proj"],
        base_model_name_or_path="some-base",
        **options,
    )
    write_adapter(folder, config, tensors)
    return folder


def write_bundle(folder: Path, **changes: object) -> Path:
    """``y = x @ W``, W external, with the manifest that belongs to it."""
    folder.mkdir()
    W = np.arange(20, dtype=np.float32).reshape(4, 5)
    ir.save(_graph(W), folder / MODEL, external_data=MODEL_DATA, size_threshold_bytes=0)
    (folder / "config.json").write_text("{}", "utf-8")
    values = {
        "versions": {"peft-deploy": "0.1.0", "paddlepaddle": "3.3.1"},
        "model_type": "llama",
        "architecture": "LlamaForCausalLM",
        "signature": SIGNATURE,
        "opset": 17,
        "precision": "fp32",
        "base": {"name": "some-base", "layout": "paddlenlp", "fingerprint": "ab" * 32},
        "adapters": [
            {
                "name": "answers",
                "method": "lora",
                "mode": "merged",
                "rank": RANK,
                "scaling": 4.0,
                "targets": list(MODULES),
                "replaced": [],
                "fingerprint": "cd" * 32,
            }
        ],
        "files": {n: sha256(folder / n) for n in (MODEL, MODEL_DATA, "config.json")},
        "graph": {"operators": {"MatMul": 1}},
        "parity": {"passed": True, "summary": "Parity passed: 110 outputs agree."},
    }
    manifest = Manifest(**{**values, **changes})
    (folder / MANIFEST).write_text(manifest.to_json(), "utf-8")
    return folder


def _graph(W: np.ndarray) -> ir.Model:
    x = ir.Value(name="x", shape=ir.Shape(["batch", 4]), type=ir.TensorType(ir.DataType.FLOAT))
    weight = ir.Value(name="W", const_value=ir.tensor(W, name="W"))
    node = ir.node("MatMul", [x, weight])
    y = node.outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape(["batch", 5]), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [x], [y], nodes=[node], initializers=[weight], opset_imports={"": 17}, name="made"
    )
    return ir.Model(graph, ir_version=8)
