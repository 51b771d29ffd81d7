"""Names, element types and symbolic dimensions of the graph's inputs and outputs."""

from __future__ import annotations

import onnx_ir as ir

from peft_deploy.errors import ConversionError, listed
from peft_deploy.signature import GraphSignature, TensorSpec

# What the traced program calls its outputs, in the signature's order.
_OUTPUT = "fetch_name_{}"


class ApplySignaturePass(ir.passes.InPlacePass):
    """Makes the graph's inputs and outputs those of a signature.

    Precondition: inputs carry the signature's names (tracing gave them), outputs Paddle's, both in its order.
    Postcondition: names, element types and dimensions are the signature's; one name a dimension, so that
    "batch" is tied across all of them; no shape of a value inside the graph is claimed.

    Args:
        signature: what the graph is to look like from outside.
    """

    def __init__(self, signature: GraphSignature) -> None:
        super().__init__()
        self._signature = signature

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Renames and annotates."""
        graph, signature = model.graph, self._signature
        expected = [_OUTPUT.format(i) for i in range(len(signature.outputs))]
        _compare("inputs", [v.name or "" for v in graph.inputs], signature.input_names)
        _compare("outputs", [v.name or "" for v in graph.outputs], expected)
        for node in graph:
            for value in node.outputs:
                value.shape = None  # recorded for the passes; not needed by any runtime
        for value, spec in zip(graph.inputs, signature.inputs, strict=True):
            _annotate(value, spec)
        for value, spec in zip(graph.outputs, signature.outputs, strict=True):
            value.name = spec.name
            _annotate(value, spec)
        return ir.passes.PassResult(model, modified=True)


def _annotate(value: ir.Value, spec: TensorSpec) -> None:
    dtype = ir.DataType[{"float32": "FLOAT"}.get(spec.dtype, spec.dtype.upper())]
    if value.dtype is not None and value.dtype != dtype:
        raise ConversionError(f"{spec.name} is {value.dtype} in the converted graph, not {dtype}")
    value.dtype = dtype
    value.shape = ir.Shape(spec.dims)


def _compare(what: str, got: list[str], wanted: list[str]) -> None:
    if got != wanted:
        odd = set(got) ^ set(wanted)
        raise ConversionError(
            f"the converted graph's {what} are not the traced ones"
            + (f"; differing:\n{listed(odd)}" if odd else ": their order differs")
        )
