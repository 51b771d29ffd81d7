"""What an export's fusion and operator set come to, whichever of the two is given."""

from __future__ import annotations

from typing import Any

import pytest

from peft_deploy.config.export import ExportOptions


@pytest.mark.parametrize(
    ("given", "fusion", "declared", "converted"),
    [
        ({}, "onnx", 23, 21),
        ({"fuse": "ort"}, "ort", 23, 21),
        ({"opset": 23}, "onnx", 23, 21),
        ({"fuse": "none"}, "none", 17, 17),
        ({"opset": 17}, "none", 17, 17),
        ({"fuse": "none", "opset": 21}, "none", 21, 21),
        ({"format": "paddle"}, "none", 17, 17),
    ],
)
def test_an_old_opset_means_a_plain_graph(
    given: dict[str, Any], fusion: str, declared: int, converted: int
) -> None:
    options = ExportOptions(**given)
    assert options.fusion == fusion
    assert options.graph_opset == declared
    assert options.converted_opset == converted
    assert options.packs == (fusion != "none")
