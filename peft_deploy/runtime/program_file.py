"""What a program in Paddle's static format says of itself, read without Paddle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_deploy.errors import BundleError, CheckpointError
from peft_deploy.weights.pdiparams import read_records

# Names of operators in Paddle's JSON, whose dialects are numbers.
_PARAMETER, _INPUT, _OUTPUT = "p", "1.data", "1.fetch"


@dataclass(frozen=True)
class ProgramFile:
    """The outside of a program.

    Args:
        inputs: names of its inputs.
        outputs: names of its outputs.
        parameters: name → shape of its weights, in the order in which their file holds them.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: Mapping[str, tuple[int, ...]]


def read_program(path: Path) -> ProgramFile:
    """Reads a ``model.json``.

    Raises:
        BundleError: it is no program of Paddle's.
    """
    try:
        block = json.loads(path.read_text("utf-8"))["program"]["regions"][0]["blocks"][0]
        operators = block["ops"]
        parameters = {
            op["A"][3]: tuple(op["O"]["TT"]["D"][1]) for op in operators if op["#"] == _PARAMETER
        }
        return ProgramFile(
            inputs=tuple(_name(op) for op in operators if op["#"] == _INPUT),
            outputs=tuple(_name(op) for op in operators if op["#"] == _OUTPUT),
            parameters=dict(sorted(parameters.items())),
        )
    except (OSError, ValueError, KeyError, IndexError, TypeError, StopIteration) as exc:
        raise BundleError(
            f"{path} is not a program of Paddle's, or is damaged: {type(exc).__name__}: {exc}",
            hint="get the bundle again, or export it again",
        ) from exc


def check_weights(program: Path, params: Path) -> ProgramFile:
    """Passes when the file holds the program's weights, which Paddle itself takes one for another when it does not.

    Args:
        program: ``model.json``.
        params: ``model.pdiparams``.

    Returns:
        The program.

    Raises:
        BundleError: another number of tensors, or another shape.
    """
    read = read_program(program)
    try:
        found = [record.shape for record in read_records(params)]
    except CheckpointError as exc:
        raise BundleError(exc.message, hint="get the bundle again, or export it again") from exc
    if len(found) != len(read.parameters):
        raise BundleError(
            f"{params} holds {len(found)} tensors; {program.name} uses {len(read.parameters)}",
            hint="the two files are of different bundles",
        )
    for (name, shape), have in zip(read.parameters.items(), found, strict=True):
        if shape != have:
            raise BundleError(
                f"{params} holds {list(have)} where {program.name} uses {name} {list(shape)}",
                hint="the two files are of different bundles",
            )
    return read


def _name(op: dict[str, Any]) -> str:
    return str(next(a["AT"]["D"] for a in op["A"] if a["N"] == "name"))
