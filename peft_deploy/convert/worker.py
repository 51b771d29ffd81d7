"""The converter's process: ``python -m peft_deploy.convert.worker FOLDER EVENTS_FD``.

Tracing and Paddle2ONNX run here, away from the user's process, because Paddle2ONNX calls ``abort()`` for what it
cannot convert, keeps global state, and writes its log to C++ stdout. Reads ``request.json`` in FOLDER; leaves the
weightless graph, or the traced program itself, and its names there, or ``error.json``. Writes the title of each
phase, one a line, to EVENTS_FD.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import sys
from collections import defaultdict
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_deploy.config.export import ONNX
from peft_deploy.environment import (
    import_paddlenlp_models,
    require_paddle,
    require_paddle_inference,
)
from peft_deploy.errors import ConversionError, PeftDeployError

if TYPE_CHECKING:
    from paddle import nn

    from peft_deploy.trace.preflight import OperatorUse
    from peft_deploy.trace.program import TracedProgram

REQUEST_FILE = "request.json"
ERROR_FILE = "error.json"
PROGRAM_FILE = "program.json"
OPERATORS_FILE = "operators.json"  # beside a program that was traced in another process
GRAPH_FILE = "graph.onnx"
NAMES_FILE = "names.json"
CONSTANTS_FILE = "constants.npz"
ENCODER_FOLDER = "encoder"  # has the same files for the encoder of a model of two graphs
_ABSENT_PARAMS = (
    "no-such-file.pdiparams"  # a params file that does not exist: a graph without weights
)


def main(folder: Path, events: int) -> int:
    """Does the job; returns the exit status."""

    def phase(title: str) -> None:
        os.write(events, f"{title}\n".encode())

    if not (folder / REQUEST_FILE).exists():
        _import_early()
        if not sys.stdin.buffer.read(1):
            return 0  # nobody has anything to convert
    try:
        _convert(folder, json.loads((folder / REQUEST_FILE).read_text("utf-8")), phase)
    except PeftDeployError as exc:
        error = {"class": type(exc).__name__, "message": exc.message, "hint": exc.hint}
        (folder / ERROR_FILE).write_text(json.dumps(error), "utf-8")
        return 1
    return 0


def _import_early() -> None:
    """What takes long to import and most jobs need, before the request is there."""
    with contextlib.suppress(Exception):  # comes up again where it is needed
        require_paddle_models()
        for module in ("base.dygraph", "families", "trace.program"):
            importlib.import_module(f"peft_deploy.{module}")


def leave_traced(
    folder: Path, traced: TracedProgram, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Leaves a program for the child that was traced in another process.

    Args:
        folder: the child's.
        traced: the program.
        shapes: of all of the model's weights, by structured name.
    """
    traced.save(folder / PROGRAM_FILE)
    uses = [use.to_dict() for use in traced.operators(folder / PROGRAM_FILE)]
    (folder / OPERATORS_FILE).write_text(json.dumps(uses), "utf-8")
    listed = {name: list(shape) for name, shape in shapes.items()}
    _write_names(folder, traced, listed, ["paddlepaddle", "paddle2onnx"])


def _convert_traced(folder: Path, opset: int, phase: Any) -> None:
    from peft_deploy.trace.preflight import OperatorUse

    phase("Importing Paddle2ONNX")
    require_paddle_inference("exporting a model")
    importlib.import_module("paddle2onnx")

    phase("Checking operators")
    uses = json.loads((folder / OPERATORS_FILE).read_text("utf-8"))
    _check_operators([OperatorUse.from_dict(use) for use in uses])
    phase("Converting to ONNX")
    _make_graph(folder, opset)


def _convert(folder: Path, request: dict[str, Any], phase: Any) -> None:
    if request["traced"]:
        _convert_traced(folder, request["opset"], phase)
        return
    phase("Importing Paddle")
    require_paddle_models()
    from peft_deploy.base.dygraph import build_skeleton
    from peft_deploy.families import EncoderDecoderFamily, find_family
    from peft_deploy.trace.program import trace_model

    config = request["config"]
    family = find_family(config)
    phase("Building the skeleton")
    skeleton = build_skeleton(family, config)
    phase("Tracing")
    _leave(
        folder, skeleton, trace_model(skeleton, family, family.signature(config)), request, phase
    )
    if isinstance(family, EncoderDecoderFamily):
        phase("Tracing the encoder")
        encoder, signature = family.encoder_stand_in(skeleton), family.encoder_signature(config)
        traced = trace_model(skeleton, family, signature, stand_in=encoder)
        (folder / ENCODER_FOLDER).mkdir()
        _leave(folder / ENCODER_FOLDER, skeleton, traced, request, phase)


def _leave(
    folder: Path, skeleton: nn.Layer, traced: TracedProgram, request: dict[str, Any], phase: Any
) -> None:
    """Leaves the graph of a traced program, or the program itself, and its names in a folder."""
    from peft_deploy.families.standins.parameters import unique_parameters

    packages = ["paddlepaddle", "paddlenlp"]
    if request["format"] == ONNX:
        traced.save(folder / PROGRAM_FILE)
        phase("Checking operators")
        _check_operators(traced.operators(folder / PROGRAM_FILE))
        phase("Converting to ONNX")
        _make_graph(folder, request["opset"])
        packages.append("paddle2onnx")
    else:
        traced = traced.under_own_names()
        traced.save(folder / PROGRAM_FILE)
    shapes = {name: list(p.shape) for name, p in unique_parameters(skeleton).items()}
    _write_names(folder, traced, shapes, packages)


def _check_operators(uses: list[OperatorUse]) -> None:
    from paddle2onnx.utils import get_all_supported_operators_pir

    from peft_deploy.trace.preflight import check_program

    check_program(uses, get_all_supported_operators_pir())


def _make_graph(folder: Path, opset: int) -> None:
    import paddle2onnx

    data = paddle2onnx.export(
        str(folder / PROGRAM_FILE),
        str(folder / _ABSENT_PARAMS),
        None,
        opset_version=opset,
        optimize_tool="None",  # the default installs packages while it runs
    )
    if not data:
        raise ConversionError("Paddle2ONNX returned an empty model")
    (folder / GRAPH_FILE).write_bytes(data)


def _write_names(
    folder: Path, traced: TracedProgram, shapes: dict[str, list[int]], packages: list[str]
) -> None:
    import numpy as np

    np.savez(folder / CONSTANTS_FILE, **traced.constants)
    names = {
        "parameters": traced.parameters,
        "shapes": shapes,
        "operations": _operations(traced),
        "versions": {package: version(package) for package in packages},
    }
    (folder / NAMES_FILE).write_text(json.dumps(names), "utf-8")


def require_paddle_models() -> None:
    """Paddle, and of PaddleNLP only the models."""
    import_paddlenlp_models()
    require_paddle("exporting a model")


def _operations(traced: TracedProgram) -> dict[str, list[dict[str, Any]]]:
    """Module path and result shapes of each operator, by operator name, in the order Paddle2ONNX numbers them."""
    from peft_deploy.trace.program import module_of

    operations: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for op in traced.program.global_block().ops:
        shapes = [list(r.shape) if r.is_dense_tensor_type() else None for r in op.results()]
        # An output is what computes it: its value goes by the output's name, not by that operator's.
        is_output = op.name() == "pd_op.fetch"
        source = op.operand_source(0).get_defining_op() if is_output else op
        operations[op.name()].append({"module": module_of(source), "shapes": shapes})
    return dict(operations)


if __name__ == "__main__":
    gc.disable()  # the process is short, and makes little garbage among many objects: a fifth of its time
    status = main(Path(sys.argv[1]), int(sys.argv[2]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # Paddle takes a second to take itself apart
