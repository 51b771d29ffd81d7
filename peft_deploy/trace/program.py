"""Tracing: a model's forward becomes a static program whose weights are names. Needs Paddle."""

from __future__ import annotations

from peft_deploy.environment import require_paddle

require_paddle("tracing a model")

import json
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import paddle
from paddle import nn
from paddle.autograd.backward_utils import ValueSet, get_real_op_inputs, get_real_op_outputs
from paddle.base import core
from paddle.pir import Value
from paddle.static import InputSpec
from paddle.static.pir_io import normalize_pir_program

from peft_deploy.errors import TraceError, listed
from peft_deploy.families import Family
from peft_deploy.families.standins import ScopeTrace
from peft_deploy.families.standins.parameters import unique_parameters
from peft_deploy.signature import GraphSignature, TensorSpec
from peft_deploy.trace.preflight import OperatorUse
from peft_deploy.trace.quirks import WRONG_ATTRIBUTES

Array = npt.NDArray[np.generic]
_TABLE = "~table.{:04}"  # "~" is the last printable character of ASCII
_ERROR = re.compile(r"\w*(Error|Exception): ")
_CALLSTACK_FRAMES = 8  # Paddle's own frames above the user's line are at most four deep


@dataclass(frozen=True)
class TracedProgram:
    """A static program whose parameters are names without data.

    Args:
        program: Paddle's program, pruned to what the outputs need.
        signature: names of its inputs; its outputs are ``fetch_name_0``, … in the signature's order.
        parameters: Paddle's variable name → the model's structured parameter name.
        constants: Paddle's variable name → a table that the stand-in keeps (rotary cos and sin).
    """

    program: Any
    signature: GraphSignature
    parameters: dict[str, str]
    constants: dict[str, Array]

    def save(self, path: Path) -> None:
        """Writes the program as Paddle's JSON, the form that Paddle2ONNX reads."""
        # overwrite, not readable (the converter does not parse indented JSON), trainable
        core.serialize_pir_program(self.program, str(path), True, False, True)

    def under_own_names(self) -> TracedProgram:
        """The program in names that do not depend on this process, for Paddle's own format.

        Parameters go by their structured names, outputs by the signature's, and tables by names that sort after
        all of them, so that the weights can be written before the tables are known. Changes the program in place.
        """
        names = dict(self.parameters)
        for op in self.program.global_block().ops:
            if op.name() == "builtin.parameter":
                variable = op.attrs()["parameter_name"]
                names.setdefault(variable, _TABLE.format(len(names) - len(self.parameters)))
                op.set_str_attr("parameter_name", names[variable])
            elif op.name() == "pd_op.fetch":
                op.set_str_attr("name", self.signature.output_names[op.attrs()["col"]])
        return replace(
            self,
            parameters={name: name for name in self.parameters.values()},
            constants={names[variable]: table for variable, table in self.constants.items()},
        )

    def operators(self, saved: Path) -> list[OperatorUse]:
        """The program's operators, for the preflight.

        Args:
            saved: where :meth:`save` wrote it; which attributes are double precision is only told there.
        """
        double = _float64_attributes(json.loads(saved.read_text("utf-8")))
        return [
            OperatorUse(
                name=op.name(),
                module=module_of(op),
                locate=partial(_line_of, op),
                attributes=op.attrs() if op.name().partition(".")[2] in WRONG_ATTRIBUTES else {},
                float64_attributes=double.get(op.name().partition(".")[2], ()),
            )
            for op in _walk(self.program.global_block())
        ]


def trace_model(
    model: nn.Layer,
    family: Family,
    signature: GraphSignature,
    *,
    stand_in: nn.Layer | None = None,
) -> TracedProgram:
    """Traces a model through its family's stand-in.

    Args:
        model: PaddleNLP's model, normally a skeleton; its parameters' data is never looked at.
        family: provides the stand-in.
        signature: inputs and outputs.
        stand_in: of a part of the model, in place of the family's usual one.

    Raises:
        TraceError: Paddle could not trace it.
    """
    stand_in = stand_in or family.stand_in(model)
    stand_in.eval()
    lists = [list(specs) for specs in (signature.cross, signature.past) if specs]
    own = len(signature.inputs) - sum(map(len, lists))
    arguments: list[Any] = [*signature.inputs[:own], *lists]
    program, fetches = static_program(stand_in, arguments, stand_in.scopes)
    _check_count("outputs", len(fetches), len(signature.outputs))
    names = {p.name: name for name, p in unique_parameters(model).items()}
    tables = {b.name: b for b in stand_in.buffers()}
    used = used_variables(program)
    if unknown := used - names.keys() - tables.keys():
        raise TraceError(
            f"{type(model).__name__} computes with tensors that are neither its parameters nor its buffers:\n"
            f"{listed(unknown)}",
            hint="register them with register_buffer()",
        )
    return TracedProgram(
        program=program,
        signature=signature,
        parameters={variable: names[variable] for variable in sorted(used & names.keys())},
        constants={
            variable: tables[variable].numpy() for variable in sorted(used & tables.keys())
        },
    )


def static_program(
    layer: nn.Layer, arguments: list[Any], scopes: ScopeTrace | None = None, who: str = ""
) -> tuple[Any, list[Value]]:
    """A layer's forward as a program, pruned to what its outputs need.

    Args:
        layer: whose forward takes these arguments.
        arguments: a :class:`TensorSpec` or a list of them for each.
        scopes: knows the module paths of that forward's operators.
        who: what to call it in errors; by default its class.

    Returns:
        The program, and its outputs.

    Raises:
        TraceError: Paddle could not trace it, or an argument has no part in any output.
    """
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # "Tensor do not have 'place' interface": of no consequence
        specs = paddle.utils.map_structure(_input_spec, arguments)
        concrete = _concrete_program(layer, specs, who or type(layer).__name__)
    if scopes is not None:
        scopes.apply(concrete.main_program)
    feeds, fetches = _values(concrete.inputs), _values(concrete.outputs)
    _check_count("inputs", len(feeds), len(paddle.utils.flatten(arguments)))
    if idle := _idle(concrete.main_program, feeds, fetches):
        raise TraceError(
            f"the inputs {', '.join(idle)} have no part in any output of {who or type(layer).__name__}",
            hint="leave them out of the signature",
        )
    with paddle.pir_utils.IrGuard():
        return normalize_pir_program(concrete.main_program, feeds, fetches), fetches


def _idle(program: Any, feeds: list[Value], fetches: list[Value]) -> list[str]:
    """Names of the inputs that no output depends on."""
    needed = ValueSet(fetches)
    for op in reversed(program.global_block().ops):
        if any(result in needed for result in get_real_op_outputs(op)):
            for operand in get_real_op_inputs(op):
                needed.add(operand)
    return [feed.name for feed in feeds if feed not in needed]


def used_variables(program: Any) -> set[str]:
    """Paddle's names of all parameters and tables in a program."""
    return {
        op.attrs()["parameter_name"]
        for op in program.global_block().ops
        if op.name() == "builtin.parameter"
    }


@contextmanager
def _short_callstacks() -> Iterator[None]:
    """Paddle keeps the call stack of every operator; the innermost frames are all that a message needs."""
    limit = getattr(sys, "tracebacklimit", None)
    sys.tracebacklimit = _CALLSTACK_FRAMES
    try:
        yield
    finally:
        if limit is None:
            del sys.tracebacklimit
        else:
            sys.tracebacklimit = limit


def _concrete_program(layer: nn.Layer, input_spec: list[Any], who: str) -> Any:
    try:
        with _short_callstacks():
            static = paddle.jit.to_static(layer, input_spec=input_spec, full_graph=True)
            return static.forward.concrete_program
    except Exception as exc:  # Paddle raises whatever the traced code or its own rewriting raises
        raise TraceError(f"{who} could not be traced: {_reason(exc)}") from exc


def _reason(exc: Exception) -> str:
    """What went wrong and where, in a line: Paddle puts both between a listing of the code and its own advice."""
    lines = [line.strip() for line in str(exc).strip().splitlines()]
    said = next((i for i, line in enumerate(lines) if _ERROR.match(line)), None)
    if said is None:
        return lines[-1] if lines else type(exc).__name__
    line = _user_line(lines[:said])
    return f"{lines[said]} ({line})" if line else lines[said]


def _input_spec(spec: TensorSpec) -> InputSpec:
    shape = [dim if isinstance(dim, int) else None for dim in spec.dims]
    return InputSpec(shape, spec.dtype, spec.name)


def _values(structure: Any) -> list[Value]:
    return [v for v in paddle.utils.flatten(structure) if isinstance(v, Value)]


def _check_count(what: str, got: int, wanted: int) -> None:
    if got != wanted:
        raise TraceError(f"the traced program has {got} {what}; its signature has {wanted}")


def _walk(block: Any) -> Iterator[Any]:
    for op in block.ops:
        yield op
        for inner in op.blocks():
            yield from _walk(inner)


def module_of(op: Any) -> str:
    """Path of the module that an operator was traced in, ``""`` when unknown."""
    return op.str_attr("struct_name").strip("/") if op.has_attr("struct_name") else ""


def _line_of(op: Any) -> str:
    return _user_line(op.callstack)


def _user_line(callstack: Sequence[str]) -> str:
    """The innermost frame outside Paddle, ``file:line``."""
    package = f"{Path(paddle.__file__).parent}/"
    for frame in reversed(callstack):
        text = frame.strip()
        if text.startswith('File "') and package not in text:
            file, _, rest = text[len('File "') :].partition('", line ')
            return f"{file}:{rest.split(',')[0]}"
    return ""


def _float64_attributes(saved: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """Operator → its attributes of type ``a_f64`` in a saved program, sub-blocks included."""
    found: dict[str, set[str]] = {}
    for op in _saved_operators(saved["program"]["regions"]):
        for attribute in op.get("A", ()):
            if isinstance(attribute, dict) and attribute["AT"].get("#", "").endswith(".a_f64"):
                found.setdefault(op["#"].partition(".")[2], set()).add(attribute["N"])
    return {name: tuple(sorted(names)) for name, names in found.items()}


def _saved_operators(regions: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for region in regions:
        for block in region["blocks"]:
            for op in block["ops"]:
                yield op
                yield from _saved_operators(op.get("regions", []))
