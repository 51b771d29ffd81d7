"""What works on a machine without Paddle, and without a runtime.

In a process of its own, in which the packages cannot be imported.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from source_tree import modules

SCRIPT = Path(__file__).with_name("blocked_imports.py")

EXTRAS = ("paddle", "paddlenlp", "paddle2onnx", "onnxscript", "onnxruntime")
# Everything below one of these needs Paddle, and nothing else does.
NEED_PADDLE = (
    "peft_deploy.adapters.arrays",
    "peft_deploy.adapters.lora",
    "peft_deploy.adapters.prefix",
    "peft_deploy.adapters.state_dict",
    "peft_deploy.adapters.wrapper",
    "peft_deploy.base.dygraph",
    "peft_deploy.base.mapped",
    "peft_deploy.families.eager",
    "peft_deploy.families.eager_encoder",
    "peft_deploy.families.eager_encoder_decoder",
    "peft_deploy.families.eager_repairs",
    "peft_deploy.families.standins",
    "peft_deploy.parity.activations",
    "peft_deploy.parity.layer_reference",
    "peft_deploy.parity.prefix_reference",
    "peft_deploy.parity.rounding",
    "peft_deploy.parity.reference",
    "peft_deploy.trace.layer",
    "peft_deploy.trace.program",
    "peft_deploy.training.batches",
    "peft_deploy.training.callback",
    "peft_deploy.training.loss",
    "peft_deploy.training.method",
    "peft_deploy.training.run",
    "peft_deploy.training.trainer",
    "peft_deploy.workflows.check_layer_weights",
    "peft_deploy.workflows.export_layer",
    "peft_deploy.workflows.in_memory",
    "peft_deploy.workflows.layer_source",
    "peft_deploy.workflows.unclaimed",
    "peft_deploy.workflows.validate_layer",
)
# Exporting is all that needs onnxscript.
NEED_ONNXSCRIPT = (
    "peft_deploy.convert.fusions.attention",
    "peft_deploy.convert.fusions.attention_layout",
    "peft_deploy.convert.fusions.fusion",
    "peft_deploy.convert.fusions.gelu",
    "peft_deploy.convert.fusions.pipeline",
    "peft_deploy.convert.fusions.rms_normalization",
    "peft_deploy.convert.fusions.rotary_embedding",
    "peft_deploy.convert.fusions.skip_normalization",
)
# The base install has onnx, because onnx-ir imports it. Everything below one of these needs onnx-ir; the rest also
# starts where onnx is damaged, or slow to import.
NEED_ONNX_IR = (
    "peft_deploy.convert.adapter_bank",
    "peft_deploy.convert.bind",
    "peft_deploy.convert.fusions.heads",
    "peft_deploy.convert.fusions.shapes",
    "peft_deploy.convert.graph",
    "peft_deploy.convert.nodes",
    "peft_deploy.convert.opset",
    "peft_deploy.convert.last_logits",
    "peft_deploy.convert.linears",
    "peft_deploy.convert.lora_slots",
    "peft_deploy.convert.pack_linears",
    "peft_deploy.convert.passes",
    "peft_deploy.convert.postflight",
    "peft_deploy.convert.precision",
    "peft_deploy.convert.prefix_slots",
    "peft_deploy.convert.slot_branches",
    "peft_deploy.convert.traced_weights",
    "peft_deploy.workflows.doctor",
    "peft_deploy.workflows.graph",
)


@cache
def failures(*packages: str) -> dict[str, list[str]]:
    return _run("modules", packages)


def _run(what: str, packages: tuple[str, ...]) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, str(SCRIPT), what, *packages],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout))


def below(*prefixes: str) -> set[str]:
    return {
        module.name
        for module in modules()
        if any(f"{module.name}.".startswith(f"{prefix}.") for prefix in prefixes)
    }


def test_only_the_paddle_side_needs_paddle() -> None:
    assert set(failures(*EXTRAS)) == below(*NEED_PADDLE, *NEED_ONNXSCRIPT)


def test_a_missing_paddle_is_said_in_a_sentence() -> None:
    # These are only imported by modules that have said so already.
    quiet = below(
        "peft_deploy.adapters.arrays",
        "peft_deploy.adapters.state_dict",
        "peft_deploy.adapters.wrapper",
        "peft_deploy.families.eager",
        "peft_deploy.families.eager_encoder",
        "peft_deploy.families.eager_encoder_decoder",
        "peft_deploy.families.eager_repairs",
        "peft_deploy.families.standins",
        "peft_deploy.workflows.check_layer_weights",
        "peft_deploy.workflows.export_layer",
        "peft_deploy.workflows.in_memory",
        "peft_deploy.workflows.layer_source",
        "peft_deploy.workflows.unclaimed",
        "peft_deploy.workflows.validate_layer",
        *NEED_ONNXSCRIPT,
        *(name for name in NEED_PADDLE if name.startswith("peft_deploy.training.")),
    ) - {"peft_deploy.training.batches", "peft_deploy.training.run"}
    for module, (error, text) in failures(*EXTRAS).items():
        if module not in quiet:
            assert error == "MissingExtraError", (module, text)
            assert "needs the package paddle, which is not installed" in text


def test_only_graphs_need_onnx() -> None:
    assert set(failures(*EXTRAS, "onnx")) == below(*NEED_PADDLE, *NEED_ONNXSCRIPT, *NEED_ONNX_IR)


@pytest.mark.parametrize("packages", [EXTRAS, (*EXTRAS, "onnx")], ids=["extras", "onnx, too"])
def test_help_needs_nothing(packages: tuple[str, ...]) -> None:
    texts = _run("help", packages)
    assert texts.pop("heavy") == []
    assert {"", "train", "export", "validate", "generate", "inspect", "doctor"} <= set(texts)
    for command, (code, text) in texts.items():
        assert code == 0, (command, text)
        assert "Usage: " in text and "--help" in text
