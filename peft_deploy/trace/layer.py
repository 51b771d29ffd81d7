"""Tracing any layer by its own forward, for models that no family knows. Needs Paddle."""

from __future__ import annotations

from peft_deploy.environment import require_paddle

require_paddle("tracing a layer")

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import paddle
from paddle import Tensor, nn

from peft_deploy.config.layer_signature import LayerSignature
from peft_deploy.errors import ConfigError, TraceError, listed, nearest
from peft_deploy.families.standins import ScopeTrace
from peft_deploy.signature import GraphSignature, TensorSpec
from peft_deploy.trace.program import TracedProgram, static_program, used_variables

FLOATING = ("float32", "float16", "bfloat16", "float64")


def trace_layer(layer: nn.Layer, signature: LayerSignature) -> TracedProgram:
    """Traces a layer as it is.

    Args:
        layer: any layer, its weights in float32; in the mode and with everything else as it was afterwards.
        signature: its inputs and outputs.

    Returns:
        The program; its signature has the outputs' types and sizes as Paddle infers them. Dimensions that change
        are called after the output and the axis. Buffers are among the parameters.

    Raises:
        ConfigError: weights of another type than float32, or input names that the forward's arguments do not have.
        TraceError: Paddle could not trace it, or an input has no part in any output.
    """
    _check_types(layer)
    named = takes_names(layer, signature)
    with evaluating(layer), _module_paths(layer) as scopes:
        flat, arguments = _Flat(layer, signature, named), [list(signature.inputs)]
        program, fetches = static_program(flat, arguments, scopes, type(layer).__name__)
    _drop_scopes_of_paddle(program)
    names = {p.name: name for name, p in layer.named_parameters()}
    names |= {b.name: name for name, b in layer.named_buffers() if b is not None}
    used = used_variables(program)
    if unknown := used - names.keys():
        raise TraceError(
            f"{type(layer).__name__} computes with {len(unknown)} tensors that are neither its parameters nor its "
            f"buffers:\n{listed(unknown)}",
            hint="register them with register_buffer()",
        )
    return TracedProgram(
        program=program,
        signature=GraphSignature(signature.inputs, _outputs(signature, fetches)),
        parameters={variable: names[variable] for variable in sorted(used)},
        constants={},
    )


def weights_of(layer: nn.Layer) -> dict[str, Tensor]:
    """Name → parameter or buffer, each tensor once."""
    buffers = {name: b for name, b in layer.named_buffers() if b is not None}
    return {**dict(layer.named_parameters()), **buffers}


def call_layer(
    layer: nn.Layer, inputs: list[Tensor], signature: LayerSignature, named: bool
) -> list[Tensor]:
    """The outputs of a layer in the signature's order.

    Args:
        layer: to call.
        inputs: in the signature's order.
        signature: names inputs and outputs.
        named: pass the inputs by name rather than by position.

    Raises:
        TraceError: it returns something else than so many tensors.
    """
    positional, keywords = _arranged(inputs, signature, named)
    returned = layer(*positional, **keywords)
    outputs: list[Tensor] = flatten(returned, signature, type(layer).__name__)
    return outputs


def takes_names(layer: nn.Layer, signature: LayerSignature) -> bool:
    """Whether the inputs are passed by name: unless the forward's arguments have none (``*args``, or ``/``).

    Raises:
        ConfigError: an input goes by another name than all of the forward's arguments. It is not passed by position
            then, as it could be taken for another one of the same shape.
    """
    parameters = inspect.signature(layer.forward).parameters.values()
    kinds = {p.name: p.kind for p in parameters}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = [name for name, kind in kinds.items() if kind in named]
    unknown = [spec.name for spec in signature.inputs if spec.name not in known]
    close = {name: found[0] for name in unknown if (found := nearest(name, known))}
    if (
        inspect.Parameter.VAR_KEYWORD in kinds.values()
    ):  # takes any other name, but not a slip of the pen
        unknown = list(close)
    if not unknown:
        return True
    unnamed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY)
    if len(unknown) == len(signature.inputs) and any(kind in unnamed for kind in kinds.values()):
        return False
    raise ConfigError(
        f"the signature has the input {', '.join(unknown)}, and {type(layer).__name__}.forward has no such argument; "
        f"it takes {', '.join(known) or 'none by name'}",
        hint=", ".join(f"{name}: did you mean {meant}?" for name, meant in close.items())
        or "call every input as the forward calls its argument",
    )


@paddle.jit.not_to_static  # type: ignore[untyped-decorator]
def _arranged(
    inputs: list[Tensor], signature: LayerSignature, named: bool
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Positional and keyword arguments."""
    if not named:
        return inputs, {}
    names = [spec.name for spec in signature.inputs]
    return [], dict(zip(names, inputs, strict=True))


@paddle.jit.not_to_static  # type: ignore[untyped-decorator]
def flatten(returned: Any, signature: LayerSignature, who: str) -> list[Tensor]:
    """The outputs that a forward returned, in the signature's order.

    Of a mapping that has all of the signature's names, those; else all tensors in order, None left out.

    Raises:
        TraceError: another number of tensors, or something that is no tensor.
    """
    if isinstance(returned, Mapping) and set(signature.outputs) <= set(returned):
        returned = [returned[name] for name in signature.outputs]
    found = list(_leaves(returned, who))
    if len(found) != len(signature.outputs):
        raise TraceError(
            f"{who} returns {len(found)} tensors; the signature names {len(signature.outputs)} outputs: "
            f"{', '.join(signature.outputs)}"
        )
    return found


def _leaves(returned: Any, who: str) -> Iterator[Tensor]:
    if isinstance(returned, Tensor | paddle.pir.Value):
        yield returned
    elif isinstance(returned, Mapping):
        for item in returned.values():
            yield from _leaves(item, who)
    elif isinstance(returned, list | tuple):
        for item in returned:
            yield from _leaves(item, who)
    elif returned is not None:
        raise TraceError(f"{who} returns a {type(returned).__name__}, which is no tensor")


class _Flat(nn.Layer):  # type: ignore[misc]
    """The layer with one list of inputs and one of outputs."""

    def __init__(self, layer: nn.Layer, signature: LayerSignature, named: bool) -> None:
        super().__init__()
        self.layer = layer
        self.signature = signature
        self.named = named

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """The layer's outputs."""
        outputs: list[Tensor] = _separate(
            call_layer(self.layer, inputs, self.signature, self.named)
        )
        return outputs


@paddle.jit.not_to_static  # type: ignore[untyped-decorator]
def _separate(outputs: list[Tensor]) -> list[Tensor]:
    """Assigned once more where Paddle's saved programs would take an output for another value: an input, what an
    addition makes of one, or the same output twice.
    """
    separate: list[Tensor] = []
    for output in outputs:
        alike = any(output is other for other in separate)
        risky = output.get_defining_op().name() in ("pd_op.data", "pd_op.scale")
        separate.append(paddle.assign(output) if alike or risky else output)
    return separate


def _outputs(signature: LayerSignature, fetches: list[Any]) -> tuple[TensorSpec, ...]:
    specs = []
    for name, value in zip(signature.outputs, fetches, strict=True):
        dims = (dim if dim >= 0 else f"{name}.{axis}" for axis, dim in enumerate(value.shape))
        specs.append(TensorSpec(name, str(value.dtype).rpartition(".")[2].lower(), tuple(dims)))
    return tuple(specs)


def _check_types(layer: nn.Layer) -> None:
    types = {name: str(t.dtype).rpartition(".")[2] for name, t in weights_of(layer).items()}
    wrong = [f"{n}: {t}" for n, t in types.items() if t in FLOATING and t != "float32"]
    if wrong:
        raise ConfigError(
            f"{type(layer).__name__} has weights that are not float32:\n{listed(wrong)}",
            hint='call layer.to(dtype="float32") first',
        )


class _Scopes(ScopeTrace):
    """Scopes that are entered by their whole path."""

    def enter(self, path: str) -> list[str]:
        """Operators belong to the module from now on; returns what :meth:`leave` wants."""
        before, self._path = self._path, path.split(".")
        self._mark()
        return before

    def leave(self, before: list[str]) -> None:
        """Operators belong to the module before again."""
        self._path = before
        self._mark()


@contextmanager
def _module_paths(layer: nn.Layer) -> Iterator[_Scopes]:
    """Notes, while the layer is traced, which of its parts every operator belongs to.

    Paddle's own note has the classes' names, numbered by how often the process has traced one.
    """
    scopes, before = _Scopes(), []
    with ExitStack() as stack:
        for path, part in layer.named_sublayers():

            def enter(_part: nn.Layer, _inputs: Any, path: str = path) -> None:
                before.append(scopes.enter(path))

            def leave(_part: nn.Layer, _inputs: Any, _outputs: Any) -> None:
                scopes.leave(before.pop())

            stack.callback(part.register_forward_pre_hook(enter).remove)
            stack.callback(part.register_forward_post_hook(leave).remove)
        yield scopes


def _drop_scopes_of_paddle(program: Any) -> None:
    for op in program.global_block().ops:
        if op.has_attr("struct_name") and op.str_attr("struct_name").startswith("/"):
            op.set_str_attr("struct_name", "")


@contextmanager
def evaluating(layer: nn.Layer) -> Iterator[None]:
    """Dropout off, running statistics used, and every layer's mode as it was afterwards."""
    training = [part for part in layer.sublayers(include_self=True) if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
