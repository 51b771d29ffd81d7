"""Whether this machine can do what it is there for: the packages, and a small job of each kind."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from peft_deploy.base import open_base
from peft_deploy.config.export import ExportOptions
from peft_deploy.diagnosis import Check, Diagnosis, Verdict, check_machine
from peft_deploy.errors import ConversionError, ParityError, PeftDeployError
from peft_deploy.progress import Progress, Silent
from peft_deploy.runtime import OnnxRunner
from peft_deploy.runtime.onnx_runner import EXECUTION_PROVIDERS
from peft_deploy.workflows.export import ExportResult, export
from peft_deploy.workflows.trial_model import write_base, write_lora

SEED = 7
_CONVERSION = "tiny conversion"


def diagnose(
    found: Diagnosis | None = None, *, convert: bool = True, progress: Progress | None = None
) -> Diagnosis:
    """Checks the packages, runs a small graph on each execution provider, and converts a small model.

    Nothing that fails is raised: it is a failed check.

    Args:
        found: the checks of the packages, when they have been made.
        convert: trace, convert, merge and verify a small model; needs the extra paddle.
        progress: is told about every phase of the conversion.
    """
    found = found or check_machine()
    checks = [*found.checks, *run_checks(found.packages)]
    if convert:
        checks.append(conversion_check(found, progress or Silent()))
    return replace(found, checks=tuple(checks))


def run_checks(packages: Mapping[str, str | None]) -> list[Check]:
    """One check for each provider that this machine's onnxruntime is meant for."""
    wanted = ["cpu"] if packages.get("onnxruntime") or packages.get("onnxruntime-gpu") else []
    if packages.get("onnxruntime-gpu"):
        wanted.append("cuda")
    return [_run_check(provider) for provider in wanted]


def conversion_check(found: Diagnosis, progress: Progress) -> Check:
    """The whole way from a small model and its adapter to a verified bundle.

    Args:
        found: what is installed; without Paddle and a runtime there is nothing to try.
        progress: is told about every phase.
    """
    packages = found.packages
    paddle = packages.get("paddlepaddle") or packages.get("paddlepaddle-gpu")
    runtime = packages.get("onnxruntime") or packages.get("onnxruntime-gpu")
    if not (paddle and packages.get("paddlenlp") and packages.get("paddle2onnx") and runtime):
        return Check(
            _CONVERSION,
            Verdict.INFO,
            "not tried: it needs the extra paddle and onnxruntime",
            "pip install 'peft-deploy[cpu,paddle]'",
        )
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(prefix="peft-deploy-doctor-") as folder:
            result = convert_trial_model(Path(folder), progress)
    except PeftDeployError as exc:
        return _failed(exc)
    except Exception as exc:  # PaddleNLP fails to import in many ways
        return _failed(
            ConversionError(
                f"{type(exc).__name__}: {exc}",
                hint="see the other checks; run again with --debug for the log",
            )
        )
    return Check(_CONVERSION, Verdict.PASSED, _story(result, time.perf_counter() - start))


def convert_trial_model(folder: Path, progress: Progress) -> ExportResult:
    """Makes the trial model and its adapter in ``folder``, and a verified bundle of them.

    Raises:
        ParityError: the bundle computes something else, or the check could not tell an adapter
            that was left out.
        PeftDeployError: whatever :func:`~peft_deploy.workflows.export.export` meets.
    """
    write_base(folder / "base", SEED)
    base = open_base(folder / "base")
    write_lora(folder / "adapter", base, SEED + 1)
    result = export(
        base,
        folder / "bundle",
        adapter=folder / "adapter",
        options=ExportOptions(merge=True, validate=True),
        progress=progress,
    )
    report = result.parity
    if report is None or report.effect is None or report.effect.is_blind:
        raise ParityError("the check of the trial model could not see its adapter", report=report)
    return result


def _failed(error: PeftDeployError) -> Check:
    return Check(
        _CONVERSION,
        Verdict.FAILED,
        error.message,
        error.hint or "run peft-deploy doctor --debug for the log",
        error.exit_code,
    )


def _story(result: ExportResult, seconds: float) -> str:
    assert result.manifest is not None and result.parity is not None
    nodes = sum(result.manifest.graph["operators"].values())
    outputs = sum(len(case.outputs) for case in result.parity.cases)
    return (
        f"a two-layer model and its adapter became a verified bundle of {nodes} nodes in "
        f"{seconds:.1f} s; {outputs} outputs agree with Paddle's"
    )


def _run_check(provider: str) -> Check:
    title = f"run on {provider}"
    with tempfile.TemporaryDirectory(prefix="peft-deploy-doctor-") as folder:
        path = Path(folder) / "graph.onnx"
        ir.save(_product(), path)
        a = np.array([[1, 2], [3, 4]], np.float32)
        b = np.array([[5], [7]], np.float32)
        try:
            result = OnnxRunner(path, provider=provider).run({"a": a, "b": b})["product"]
        except PeftDeployError as exc:
            return Check(title, Verdict.FAILED, exc.message, exc.hint)
        except Exception as exc:  # an onnxruntime that cannot be imported
            return Check(
                title,
                Verdict.FAILED,
                f"{type(exc).__name__}: {exc}",
                "pip uninstall -y onnxruntime onnxruntime-gpu, then install one of them again",
            )
    if not np.array_equal(result, a @ b):
        return Check(
            title,
            Verdict.FAILED,
            f"a matrix product came out as {result.tolist()} instead of {(a @ b).tolist()}",
            "install another version of onnxruntime",
        )
    return Check(
        title, Verdict.PASSED, f"{EXECUTION_PROVIDERS[provider]} computes a graph rightly"
    )


def _product() -> ir.Model:
    """``product = a @ b``, float32 matrices of any size."""
    a = ir.Value(name="a", shape=ir.Shape(["n", "k"]), type=ir.TensorType(ir.DataType.FLOAT))
    b = ir.Value(name="b", shape=ir.Shape(["k", "m"]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("MatMul", [a, b])
    product = node.outputs[0]
    product.name, product.shape = "product", ir.Shape(["n", "m"])
    product.type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([a, b], [product], nodes=[node], opset_imports={"": 17}, name="trial")
    return ir.Model(graph, ir_version=8)
