"""The facts about a bundle's files."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from made_things import SIGNATURE, write_bundle

from peft_deploy.errors import BundleError
from peft_deploy.inspection import BundleInspection, inspect
from peft_deploy.signature import GraphSignature, TensorSpec


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


def states(found: BundleInspection) -> dict[str, str]:
    return {file.name: file.state for file in found.files}


def test_the_facts(bundle: Path) -> None:
    found = inspect(bundle)
    assert isinstance(found, BundleInspection)
    assert found.manifest.signature == SIGNATURE
    assert (found.operators, found.nodes) == ({"MatMul": 1}, 1)
    assert found.bytes == sum(p.stat().st_size for p in bundle.iterdir())
    assert set(states(found).values()) == {"listed"}
    assert found.problems == () and not found.verified
    json.dumps(found.to_dict())


def test_verify_reads_everything(bundle: Path) -> None:
    found = inspect(bundle, verify=True)
    assert found.problems == () and found.verified
    assert states(found) == {
        "model.onnx": "intact",
        "model.onnx.data": "intact",
        "config.json": "intact",
        "peft_deploy.json": "listed",
    }


def test_one_changed_byte_of_the_weights(bundle: Path) -> None:
    data = bytearray((bundle / "model.onnx.data").read_bytes())
    data[7] ^= 1
    (bundle / "model.onnx.data").write_bytes(data)
    assert inspect(bundle).problems == ()  # nobody has looked
    found = inspect(bundle, verify=True)
    assert states(found)["model.onnx.data"] == "changed"
    assert found.problems == ("model.onnx.data is not the file that the manifest describes",)


def test_a_missing_file_shows_unasked(bundle: Path) -> None:
    (bundle / "model.onnx.data").unlink()
    found = inspect(bundle)
    assert states(found)["model.onnx.data"] == "missing"
    assert found.problems == ("model.onnx.data is missing",)


def test_a_file_that_the_manifest_does_not_know(bundle: Path) -> None:
    (bundle / "notes.txt").write_text("mine", "utf-8")
    found = inspect(bundle, verify=True)
    assert states(found)["notes.txt"] == "not listed"
    assert found.problems == ()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"opset": 18}, "opset 17, the manifest says 18"),
        ({"graph": {"operators": {"MatMul": 2}}}, "operators"),
        (
            {"signature": replace(SIGNATURE, outputs=(TensorSpec("y", "float32", ("batch", 6)),))},
            r"output y is float32 \['batch', 5\] in the graph and float32 \['batch', 6\]",
        ),
        (
            {"graph": {"operators": {"MatMul": 1}, "prefix_slots": ["prefix.0.key"]}},
            "slot prefix.0.key is not in the graph but in the manifest",
        ),
        (
            {"signature": GraphSignature((), SIGNATURE.outputs)},
            "input x is float32 .* in the graph and absent",
        ),
    ],
)
def test_a_manifest_that_describes_another_graph(
    tmp_path: Path, change: dict[str, object], said: str
) -> None:
    found = inspect(write_bundle(tmp_path / "b", **change), verify=True)
    (problem,) = found.problems
    assert re.search(said, problem)


def test_a_manifest_that_names_files_outside(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b", files={"../secret": "00"})
    with pytest.raises(BundleError, match="outside"):
        inspect(folder)


def test_damaged_manifests(bundle: Path) -> None:
    manifest = bundle / "peft_deploy.json"
    text = manifest.read_text("utf-8")
    manifest.write_text(text[: len(text) // 2], "utf-8")
    with pytest.raises(BundleError, match="cannot be read"):
        inspect(bundle)
    data = json.loads(text)
    del data["opset"]
    manifest.write_text(json.dumps(data), "utf-8")
    with pytest.raises(BundleError, match="incomplete"):
        inspect(bundle)


def test_a_model_that_is_no_model(bundle: Path) -> None:
    (bundle / "model.onnx").write_bytes(b"\xff" * 40)
    with pytest.raises(BundleError, match="not an ONNX model"):
        inspect(bundle)
