"""What must be true of a finished graph, whatever made it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import onnx_ir as ir

from peft_deploy.errors import ConversionError, listed
from peft_deploy.signature import GraphSignature

_CONTROL_FLOW = frozenset({"If", "Loop", "Scan"})


def check_graph(
    model: ir.Model,
    signature: GraphSignature,
    opset: int,
    slots: Collection[str] = (),
    *,
    domains: Collection[str] = (),
) -> dict[str, int]:
    """Checks a graph against what was asked for.

    Args:
        model: the graph, its weights bound.
        signature: inputs and outputs.
        opset: version of the default operator set.
        slots: further inputs, which have a default.
        domains: of operators that may appear beside the default one.

    Returns:
        Operator → how often it appears.

    Raises:
        ConversionError: another opset or domain, control flow, dangling values, names used twice, inputs or
            outputs that are not the signature's, slots that were not asked for.
    """
    graph = model.graph
    problems = []
    if model.opset_imports.get("") != opset:
        problems.append(f"opset {model.opset_imports.get('')} instead of {opset}")
    foreign = sorted(set(model.opset_imports) - {"", *domains})
    if foreign:
        problems.append(f"operator domains {', '.join(foreign)}")
    counts = Counter(node.op_type for node in graph)
    if found := _CONTROL_FLOW & counts.keys():
        problems.append(f"control flow: {', '.join(sorted(found))}")
    problems += _dangling(graph)
    problems += _repeated(graph)
    given = [v.name for v in graph.inputs if v.name not in graph.initializers]
    if given != signature.input_names:
        problems.append("inputs that are not the signature's")
    if {v.name for v in graph.inputs} - set(given) != set(slots):
        problems.append("inputs with a default that are not the slots for adapters")
    if [v.name for v in graph.outputs] != signature.output_names:
        problems.append("outputs that are not the signature's")
    if problems:
        raise ConversionError("the converted graph has\n" + listed(problems))
    return dict(counts)


def _dangling(graph: ir.Graph) -> list[str]:
    inputs = {id(value) for value in graph.inputs}
    return [
        f"a dangling value {value.name} in {node.name}"
        for node in graph
        for value in node.inputs
        if value is not None
        and value.producer() is None
        and id(value) not in inputs
        and graph.initializers.get(value.name or "") is not value
    ]


def _repeated(graph: ir.Graph) -> list[str]:
    names = Counter(node.name for node in graph)
    # An output without a name is one that the operator need not compute.
    names.update(value.name for node in graph for value in node.outputs if value.name != "")
    names.update(list(graph.initializers))
    return [f"the name {name} {count} times" for name, count in names.items() if count > 1]
