"""The table of converter faults is true of the converter that is installed.

A test here that fails after an update of Paddle2ONNX says that an entry can go.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from peft_deploy.trace.quirks import RENAMED, REPLACEMENTS, WRONG, WRONG_ATTRIBUTES

pytestmark = pytest.mark.convert

SCRIPT = r"""
import json, os, sys, tempfile
from peft_deploy.environment import require_paddle
require_paddle("the test")
import numpy as np, onnxruntime as ort, paddle, paddle2onnx
import quirk_layers
out = os.dup(1); os.dup2(2, 1)
x = np.linspace(-3, 3, 24, dtype="float32").reshape(2, 3, 4)
results = {}
for name in sys.argv[1:]:
    layer = getattr(quirk_layers, name)(); layer.eval()
    with tempfile.TemporaryDirectory() as folder:
        spec = [paddle.static.InputSpec([None, None, 4], "float32", "x")]
        paddle.jit.save(layer, f"{folder}/m", input_spec=spec)
        data = paddle2onnx.export(f"{folder}/m.json", "", None, opset_version=17, optimize_tool="None")
    want = layer(paddle.to_tensor(x)).numpy()
    try:
        got = ort.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        results[name] = float(np.abs(got - want).max())
    except Exception as exc:
        results[name] = str(exc)
os.write(out, json.dumps(results).encode())
"""


@pytest.fixture(scope="module")
def supported() -> set[str]:
    script = (
        "import json, os; out = os.dup(1); os.dup2(2, 1)\n"
        "from paddle2onnx.utils import get_all_supported_operators_pir as g\n"
        "os.write(out, json.dumps(list(g())).encode())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    return set(json.loads(done.stdout))


@pytest.fixture(scope="module")
def errors() -> dict[str, Any]:
    from pathlib import Path

    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "TanhGelu", "ErfGelu", "RepeatInterleave"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loaded: dict[str, Any] = json.loads(done.stdout)
    return loaded


def test_renamed_operators_are_registered_under_the_old_name(supported: set[str]) -> None:
    assert {old for old in RENAMED.values() if old not in supported} == set()


def test_operators_to_be_replaced_are_not_registered(supported: set[str]) -> None:
    assert set(REPLACEMENTS) & supported == set()


def test_wrong_operators_are_registered(supported: set[str]) -> None:
    assert set(WRONG) <= supported
    assert set(WRONG_ATTRIBUTES) <= supported


def test_tanh_gelu_is_converted_to_the_erf_form(errors: dict[str, Any]) -> None:
    assert errors["ErfGelu"] < 1e-6
    assert errors["TanhGelu"] > 1e-5


def test_repeat_interleave_does_not_run_with_dynamic_sizes(errors: dict[str, Any]) -> None:
    assert "Tile" in str(errors["RepeatInterleave"])
