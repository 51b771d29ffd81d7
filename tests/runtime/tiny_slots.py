"""Bundles of the small decoder with slots for LoRA, adapters for them, and what both mean in numpy."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from peft_deploy.adapters.formats.onnx_file import model_version, write_onnx_adapter
from peft_deploy.bundle.manifest import MANIFEST, Manifest
from peft_deploy.convert.adapter_bank import AddAdapterBankPass
from peft_deploy.convert.linears import NO_GROUPS, Groups
from peft_deploy.convert.lora_slots import AddLoraSlotsPass
from peft_deploy.convert.weight_file import WeightFile

FINGERPRINT = "5eed" * 16
VERSION = model_version(FINGERPRINT)
LINEARS = ("q", "k", "v", "o", "up", "down")
# Layers that read the same input, which share an A where a graph is made with these.
GROUPS = {
    f"model.layers.{i}.qkv": [f"model.layers.{i}.{part}" for part in "qkv"] for i in range(2)
}

Arrays = Mapping[str, np.ndarray]


def module_of(weight: str) -> str:
    """``0.q`` → ``model.layers.0.q``; the head is the head."""
    return f"model.layers.{weight}" if weight[0].isdigit() else weight


def add_slots(
    bundle: Path,
    folder: Path,
    rank: int | None = None,
    bank: int | None = None,
    groups: Groups = NO_GROUPS,
) -> Path:
    """A copy of a bundle whose linear layers all have slots, or a bank for that many adapters."""
    shutil.copytree(bundle, folder)
    model = ir.load(folder / "model.onnx")
    for name, value in list(model.graph.initializers.items()):
        if name.partition(".")[2] in LINEARS or name == "head":
            value.name = f"{module_of(name)}.weight"
    with WeightFile(folder / "zeros.data") as file:
        if bank is None:
            AddLoraSlotsPass(lambda linears: linears, file, rank, groups)(model)
        else:
            AddAdapterBankPass(lambda linears: linears, groups)(model)
    ir.save(model, folder / "model.onnx")
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    if bank is not None:
        manifest["signature"] = Manifest.read(folder).signature.with_adapter_ids().to_dict()
        manifest["graph"] |= {"adapter_bank": {"capacity": bank}}
    manifest["base"]["fingerprint"] = FINGERPRINT
    files = [p for p in folder.iterdir() if p.name != MANIFEST]
    manifest["files"] = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    (folder / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    return folder


def keep_adapter(bundle: Path, name: str, tensors: Arrays) -> None:
    """Puts an adapter into a bundle."""
    path = bundle / "adapters" / f"{name}.onnx_adapter"
    path.parent.mkdir(exist_ok=True)
    write_onnx_adapter(path, tensors, VERSION)
    manifest = json.loads((bundle / MANIFEST).read_text("utf-8"))
    manifest["adapters"].append({"name": name, "method": "lora", "mode": "runtime"})
    manifest["files"][f"adapters/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (bundle / MANIFEST).write_text(json.dumps(manifest), "utf-8")


def make_adapter(
    weights: Arrays, ranks: Mapping[str, int], seed: int = 0, size: float = 0.3
) -> dict[str, np.ndarray]:
    """A and B for the named weights; their product is about as large as the weights are."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for weight, rank in ranks.items():
        inner, outer = weights[weight].shape
        A = rng.normal(0, size, (inner, rank)).astype(np.float32)
        B = rng.normal(0, size, (rank, outer)).astype(np.float32)
        module = module_of(weight)
        tensors |= {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}
    return tensors


def everywhere(rank: int) -> dict[str, int]:
    """The same rank for every linear layer."""
    return {f"{i}.{linear}": rank for i in range(2) for linear in LINEARS} | {"head": rank}


def merged(
    weights: Arrays, adapters: Iterable[Arrays], scale: float = 1.0
) -> dict[str, np.ndarray]:
    """The weights with adapters added to them, in float64."""
    result = {name: array.astype(np.float64) for name, array in weights.items()}
    for tensors in adapters:
        for name in result:
            A = tensors.get(f"{module_of(name)}.lora_A.weight")
            if A is not None:
                B = tensors[f"{module_of(name)}.lora_B.weight"]
                result[name] = result[name] + scale * (A.astype(np.float64) @ B)
    return result
