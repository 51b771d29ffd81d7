"""Signature files: what they say, and every way in which one can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peft_deploy.config.layer_signature import LayerSignature
from peft_deploy.errors import ConfigError
from peft_deploy.signature import TensorSpec

IDS = {"name": "ids", "dtype": "int64", "dims": ["batch", "sequence"], "range": [0, 131]}
IMAGE = {"name": "image", "dtype": "float32", "dims": ["batch", 3, "height", 8]}
GOOD = {"inputs": [IDS, IMAGE], "outputs": ["scores"], "sizes": {"height": [8, 16]}}


def test_a_file_says_names_types_dimensions_and_what_to_try(tmp_path: Path) -> None:
    (tmp_path / "signature.json").write_text(json.dumps(GOOD), "utf-8")
    signature = LayerSignature.read(tmp_path / "signature.json")
    assert signature.inputs[1] == TensorSpec("image", "float32", ("batch", 3, "height", 8))
    assert signature.ranges == {"ids": (0, 131)}
    assert signature.symbols == ["batch", "sequence", "height"]
    assert signature.sizes_of("batch") == (1, 3)
    assert len(signature.sizes_of("sequence")) >= 3
    assert signature.sizes_of("height") == (8, 16)
    assert LayerSignature.from_dict(json.loads(json.dumps(signature.to_dict()))) == signature


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": []}, "at least one input and one output"),
        ({"outputs": []}, "at least one input and one output"),
        ({"outputs": "scores"}, "outputs is 'scores', not a list"),
        ({"outputs": [3]}, r"outputs is \[3\], not a list"),
        ({"outputs": ["ids"]}, "the name ids twice"),
        ({"inputs": [IDS, IDS]}, "the name ids twice"),
        ({"inputs": ["ids"]}, "an input is 'ids', not an object"),
        ({"inputs": 3}, "wrong type"),
        ({"output": ["scores"]}, "unknown entries: output"),
        ({"sizes": {"width": [8]}}, "sizes are given for 'width', which no input has"),
        ({"sizes": {"height": [0]}}, r"sizes of height are \[0\]"),
        ({"sizes": {"height": []}}, r"sizes of height are \[\]"),
        ({"sizes": {"height": 3}}, "wrong type"),
    ],
)
def test_files_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LayerSignature.from_dict({**GOOD, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float16"}, "input ids is 'float16'; it can be float32"),
        ({"dims": ["batch", 0]}, "dimension 0; it must be a positive number or a name"),
        ({"dims": ["batch", "2 x"]}, "dimension '2 x'"),
        ({"dims": "batch"}, "dims is 'batch', not a list"),
        ({"range": [5, 5]}, r"range \[5, 5\]"),
        ({"range": [0]}, r"range \[0\]"),
        ({"range": ["a", "b"]}, r"range \['a', 'b'\]"),
        ({"dtype": "bool"}, r"\(bool\) has the range"),
        ({"shape": [1]}, "unknown entries: shape"),
    ],
)
def test_inputs_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LayerSignature.from_dict({**GOOD, "inputs": [{**IDS, **changes}, IMAGE]})


@pytest.mark.parametrize("entry", ["name", "dtype", "dims"])
def test_what_is_missing_is_named(entry: str) -> None:
    ids = {key: value for key, value in IDS.items() if key != entry}
    with pytest.raises(ConfigError, match=f"lacks {entry}"):
        LayerSignature.from_dict({**GOOD, "inputs": [ids, IMAGE]})


def test_integers_need_a_range() -> None:
    ids = {key: value for key, value in IDS.items() if key != "range"}
    with pytest.raises(ConfigError, match="ids is int64 and has no range") as caught:
        LayerSignature.from_dict({**GOOD, "inputs": [ids, IMAGE]})
    assert '"range": [0, N]' in str(caught.value.hint)


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "signature.json").write_text("inputs: ids", "utf-8")
    with pytest.raises(ConfigError, match="cannot be read"):
        LayerSignature.read(tmp_path / "signature.json")
