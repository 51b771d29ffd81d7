"""Attention spared what the operator does by itself: joining the cache, and bringing heads forward and back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from peft_deploy.convert.fusions.fusion import Fusion, NodeNames, folder_of
from peft_deploy.convert.fusions.heads import HEADS_FIRST, constant_ints, heads_last, ints, size

_TOKENS = (
    2  # the axis of tokens in keys and values [B, K, T, D], and of queries in a mask [B, H, S, T]
)
_QUERY, _KEY, _VALUE, _MASK, _PAST_KEY, _PAST_VALUE = range(6)  # inputs
_OUTPUTS = 3  # the result, and keys and values of all tokens


class AttentionFusion(Fusion):
    """Something that may be done to every Attention of a graph.

    Args:
        name: what the manifest calls it.
        improve: does it to one node and says whether it could.
    """

    def __init__(self, name: str, improve: Callable[[ir.Node, _Editor], bool]) -> None:
        super().__init__(name)
        self._improve = improve

    def apply(self, model: ir.Model, reasons: dict[str, str]) -> int:
        """See :class:`~peft_deploy.convert.fusions.fusion.Fusion`."""
        editor = _Editor(model.graph)
        nodes = [node for node in model.graph if node.op_type == "Attention" and not node.domain]
        return sum(self._improve(node, editor) for node in nodes)


class _Editor:
    """Adds nodes and constants to a graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self.wide_masks: dict[ir.Value, ir.Value] = {}
        self._graph = graph
        self._names = NodeNames(graph)
        self._constants: dict[tuple[int, ...], ir.Value] = {}

    def constant(self, numbers: tuple[int, ...]) -> ir.Value:
        """An initializer of int64, the same one for the same numbers."""
        if numbers not in self._constants:
            value = ir.val("attention.sizes", const_value=ir.tensor(np.array(numbers, np.int64)))
            self._names.add_initializer(value)
            self._constants[numbers] = value
        return self._constants[numbers]

    def before(self, place: ir.Node, node: ir.Node, folder: str) -> ir.Value:
        """Inserts a node of one output."""
        self._graph.insert_before(place, node)
        self._names.name(node, folder)
        return node.outputs[0]


def _join_cache(node: ir.Node, editor: _Editor) -> bool:
    """Gives the operator the cache and the new tokens apart; it makes the grown cache itself."""
    joined = [value for value in (node.inputs[_KEY], node.inputs[_VALUE]) if value is not None]
    parts = [_past_and_new(value, node) for value in joined]
    found = [part for part in parts if part is not None]
    if len(found) != 2:
        return False
    node.resize_inputs(_PAST_VALUE + 1)
    node.resize_outputs(_OUTPUTS)
    for index, (past, new) in enumerate(found):
        node.replace_input_with(_PAST_KEY + index, past)
        node.replace_input_with(_KEY + index, new)
    for whole, present in zip(joined, node.outputs[1:], strict=True):
        present.name, present.shape, present.type = whole.name, whole.shape, whole.type
        whole.name = None
        ir.convenience.replace_all_uses_with(whole, present, replace_graph_outputs=True)
    return True


def _past_and_new(value: ir.Value, user: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """The two tensors that a value joins along the tokens for this user alone."""
    joint = value.producer()
    if joint is None or joint.op_type != "Concat" or len(joint.inputs) != 2:
        return None
    past, new = joint.inputs
    axis = joint.attributes["axis"].as_int()
    if past is None or new is None or axis not in (_TOKENS, _TOKENS - 4):
        return None
    return (past, new) if all(other is user for other, _ in value.uses()) else None


def _leave_heads_last(node: ir.Node, editor: _Editor) -> bool:
    """Gives queries, keys and values as projections have them, [B, S, H * D], and takes the result so."""
    inputs = node.inputs[_QUERY : _VALUE + 1]
    origins = [origin for origin in map(heads_last, inputs) if origin is not None]
    results = _flattened(node.outputs[0])
    if len(origins) != 3 or not results:
        return False
    for index, origin in enumerate(origins):
        flat = origin.flat
        if flat is None:
            given = [origin.split, editor.constant((0, 0, -1))]
            flat = editor.before(node, ir.node("Reshape", given), folder_of(node))
        node.replace_input_with(index, flat)
    q, k, _ = origins
    node.attributes["q_num_heads"] = ir.AttrInt64("q_num_heads", q.heads)
    node.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", k.heads)
    result = node.outputs[0]
    result.shape = results[0].shape
    ir.convenience.replace_all_uses_with(results, [result] * len(results))
    return True


def _flattened(result: ir.Value) -> list[ir.Value]:
    """The values [B, S, H * D] that are all that is made of a result [B, H, S, D]; none if there are others."""
    turns = [user for user, _ in result.uses()]
    if result.is_graph_output() or len(turns) != 1 or turns[0].op_type != "Transpose":
        return []
    last = turns[0].outputs[0]
    users = [user for user, _ in last.uses()]
    if ints(turns[0], "perm") != HEADS_FIRST or last.is_graph_output():
        return []
    flat = [user for user in users if user.op_type == "Reshape" and _flattens(user)]
    outputs = [user.outputs[0] for user in flat]
    if len(flat) != len(users) or any(value.is_graph_output() for value in outputs):
        return []
    return outputs


def _flattens(reshape: ir.Node) -> bool:
    sizes = constant_ints(reshape.inputs[1])
    return sizes is not None and len(sizes) == 3 and sizes[:2] == (0, 0)


def _widen_mask(node: ir.Node, editor: _Editor) -> bool:
    """Repeats a mask of one row [B, H, 1, T] for every query: onnxruntime's operator does not broadcast this axis."""
    mask, query = node.inputs[_MASK], node.inputs[_QUERY]
    if mask is None or query is None or size(mask, _TOKENS) != 1:
        return False
    if mask not in editor.wide_masks:
        axis = 1 if "q_num_heads" in node.attributes else _TOKENS
        folder = folder_of(mask.producer() or node)
        limits = {"start": axis, "end": axis + 1}
        tokens = editor.before(node, ir.node("Shape", [query], limits), folder)
        one = editor.constant((1,))
        sizes = ir.node("Concat", [one, one, tokens, one], {"axis": 0})
        rows = editor.before(node, sizes, folder)
        editor.wide_masks[mask] = editor.before(node, ir.node("Expand", [mask, rows]), folder)
    node.replace_input_with(_MASK, editor.wide_masks[mask])
    return True


JOIN_CACHE = AttentionFusion("Attention: cache", _join_cache)
LEAVE_HEADS_LAST = AttentionFusion("Attention: heads last", _leave_heads_last)
WIDEN_MASK = AttentionFusion("Attention: one mask for all queries", _widen_mask)
