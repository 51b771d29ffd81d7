"""Logits of the last token only.

    logits = x · W   becomes   logits = x[:, -1:] · W

Generation looks at no others. Of a prompt of S tokens they are S · V numbers, and computing them is a fifth of reading
a prompt with SmolLM2-135M.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from peft_deploy.errors import ConversionError
from peft_deploy.signature import LOGITS, GraphSignature

# What a head does to the logits themselves, number by number: soft caps, factors, biases, types.
_BY_NUMBER = frozenset({"Add", "Cast", "Div", "Mul", "Sub", "Tanh"})


class LastLogitsPass(ir.passes.InPlacePass):
    """Cuts what the head multiplies down to the last token.

    Precondition: inputs and outputs are those of the signature, and the weights are dangling or initializers.
    Postcondition: they are those of ``signature.with_last_logits()``.

    Args:
        signature: of the graph as it is.

    Raises:
        ConversionError: the logits are not a product of hidden states [B, S, E] and a weight.
    """

    def __init__(self, signature: GraphSignature) -> None:
        super().__init__()
        self._dims = next(s.dims for s in signature.with_last_logits().outputs if s.name == LOGITS)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Cuts the head's input."""
        graph = model.graph
        output = next(value for value in graph.outputs if value.name == LOGITS)
        head = _head(output)
        name = _free_name(graph, "last_token")
        last = ir.val(name, const_value=ir.tensor(np.array([-1], np.int64), name=name))
        graph.register_initializer(last)
        folder = str(head.name).rpartition("/")[0]
        cut = ir.node("Gather", [head.inputs[0], last], {"axis": 1}, name=f"{folder}/last_token")
        cut.outputs[0].name = f"{cut.name}_output_0"
        graph.insert_before(head, cut)
        head.replace_input_with(0, cut.outputs[0])
        output.shape = ir.Shape(self._dims)
        return ir.passes.PassResult(model, modified=True)


def _head(output: ir.Value) -> ir.Node:
    """The product that the logits are made of."""
    value: ir.Value = output
    while True:
        node = value.producer()
        if node is not None and node.op_type == "MatMul" and _is_weight(node.inputs[1]):
            return node
        computed = (
            [v for v in node.inputs if v is not None and not _is_weight(v)]
            if node is not None and node.op_type in _BY_NUMBER
            else []
        )
        if len(computed) != 1 or (value is not output and value.is_graph_output()):
            made = "nothing" if node is None else f"{node.op_type} ({node.name})"
            raise ConversionError(
                f"the logits of the last token alone cannot be computed: {made} is between them and the head",
                hint="leave --last-logits out",
            )
        value = computed[0]


def _is_weight(value: ir.Value | None) -> bool:
    """Whether a value is the same for all inputs; a tied head is the transposed table of embeddings."""
    if value is None or value.is_graph_input():
        return False
    node = value.producer()
    return node is None or (node.op_type == "Transpose" and _is_weight(node.inputs[0]))


def _free_name(graph: ir.Graph, name: str) -> str:
    while name in graph.initializers:
        name += "_"
    return name
