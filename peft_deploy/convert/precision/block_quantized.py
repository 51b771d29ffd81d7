"""Operators that read weights in blocks of small whole numbers: onnxruntime's MatMulNBits and GatherBlockQuantized.

y = x · W    becomes  y = MatMulNBits(x, quantized, scales)          a linear layer
y = x · Wᵀ   becomes  the same                                       a head that shares the table of embeddings
y = W[ids]   becomes  y = GatherBlockQuantized(quantized, ids, scales)   that table; the same bytes of the file
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir

from peft_deploy.convert.bind import is_stored, place
from peft_deploy.convert.opset import CONTRIB
from peft_deploy.convert.weight_file import WeightFile
from peft_deploy.errors import ConversionError
from peft_deploy.weights import BlockQuantized, StoredTensor
from peft_deploy.weights.block_quantized import BLOCK, MATMUL, QUANTIZED, SCALES, TABLE

GATHER = "GatherBlockQuantized"
# Activations are rounded to int8 in blocks of 32, too, for which onnxruntime has kernels of whole numbers; a session
# can be asked for float32 (level 1).
ACCURACY_LEVEL, INT8_ACTIVATIONS = "accuracy_level", 4


@dataclass(frozen=True)
class QuantizedWeights:
    """The quantized weights of a graph.

    Args:
        weights: type, such as ``int4`` → initializers that are kept so, by the names that they had.
        float32: weights of linear layers and tables that heads share which stay what they are.
        calibrated: those of ``weights`` whose scales a text's activations chose; the others are rounded to nearest.
    """

    weights: dict[str, list[str]]
    float32: list[str]
    calibrated: list[str]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form, for the manifest."""
        return {
            "block": BLOCK,
            "weights": self.weights,
            "float32": self.float32,
            "calibrated": self.calibrated,
        }


class ReadQuantizedPass(ir.passes.InPlacePass):
    """Makes every operator on a weight that the file holds in blocks read those.

    Precondition: weights are bound; slots for adapters are there. Postcondition: no initializer without contents is
    left, and slots and other weights are what they were.

    Args:
        file: of the weights.

    Attributes:
        done: what is quantized, after the pass has run.

    Raises:
        ConversionError: an operator reads such a weight in a way that it cannot be read in.
    """

    def __init__(self, file: WeightFile) -> None:
        super().__init__()
        self._file = file
        self.done: QuantizedWeights | None = None

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replaces the operators."""
        graph, found, calibrated = model.graph, defaultdict[str, list[str]](list), list[str]()
        plain = [str(v.name) for v in graph.initializers.values() if _is_plain_linear(v)]
        for value in list(graph.initializers.values()):
            stored = is_stored(value)
            if stored is None or not isinstance(stored.storage, BlockQuantized):
                continue
            found[stored.storage.name].append(str(value.name))
            if stored.storage.importance is not None:
                calibrated.append(str(value.name))
            _Weight(graph, self._file, value, stored, stored.storage).replace()
        if found:
            graph.opset_imports[CONTRIB] = 1
        self.done = QuantizedWeights(dict(found), plain, calibrated)
        return ir.passes.PassResult(model, modified=bool(found))


def _is_plain_linear(value: ir.Value) -> bool:
    """Whether a matrix that is kept as it is multiplies something; slots are graph inputs."""
    tensor = value.const_value
    if tensor is None or len(tensor.shape) != 2 or value.is_graph_input() or is_stored(value):
        return False
    return any(_multiplies(use.node, use.idx) for use in value.uses())


def _multiplies(node: ir.Node, index: int) -> bool:
    if node.op_type == "Transpose" and not node.domain:
        return any(_multiplies(use.node, use.idx) for use in node.outputs[0].uses())
    return node.op_type in ("MatMul", "Gemm") and index == 1 and not node.domain


@dataclass(frozen=True)
class _Weight:
    """One quantized weight of a graph."""

    graph: ir.Graph
    file: WeightFile
    value: ir.Value
    stored: StoredTensor
    storage: BlockQuantized

    def replace(self) -> None:
        """Gives its users their new operators, and takes it out of the graph."""
        for use in list(self.value.uses()):
            if self.storage.rows and use.node.op_type == "Transpose":
                self._replace_transposed(use.node)
            elif self.storage.rows and use.node.op_type == "Gather" and use.idx == 0:
                self._replace_gather(use.node)
            elif not self.storage.rows and _multiplies(use.node, use.idx):
                self._replace_product(use.node)
            else:
                raise self._misread(use.node)
        del self.graph.initializers[str(self.value.name)]

    def _replace_transposed(self, transpose: ir.Node) -> None:
        """The products by the transposed table."""
        permutation = transpose.attributes.get("perm")
        if permutation is not None and list(permutation.as_ints()) != [1, 0]:
            raise self._misread(transpose)
        for use in list(transpose.outputs[0].uses()):
            if not _multiplies(use.node, use.idx):
                raise self._misread(use.node)
            self._replace_product(use.node)
        self.graph.remove(transpose, safe=True)

    def _replace_product(self, node: ir.Node) -> None:
        if node.op_type != "MatMul":
            raise self._misread(node)
        size, out = self.stored.info.shape[:: -1 if self.storage.rows else 1]
        attributes = {
            "K": size,
            "N": out,
            "bits": self.storage.bits,
            "block_size": BLOCK,
            ACCURACY_LEVEL: INT8_ACTIVATIONS,
        }
        self._put(
            node, MATMUL, [node.inputs[0], self._part(QUANTIZED), self._part(SCALES)], attributes
        )

    def _replace_gather(self, node: ir.Node) -> None:
        axis = node.attributes.get("axis")
        if axis is not None and axis.as_int() != 0:
            raise self._misread(node)
        rows, size = self.stored.info.shape
        table = self._part(QUANTIZED, (rows, size * self.storage.bits // 8))
        attributes = {
            "bits": self.storage.bits,
            "block_size": BLOCK,
            "gather_axis": 0,
            "quantize_axis": 1,
        }
        self._put(node, GATHER, [table, node.inputs[1], self._part(SCALES)], attributes)

    def _put(
        self,
        old: ir.Node,
        operator: str,
        inputs: list[ir.Value | None],
        attributes: dict[str, int],
    ) -> None:
        new = ir.node(operator, inputs, attributes=attributes, domain=CONTRIB)
        new.name = old.name and old.name.replace(old.op_type, operator)
        ir.convenience.replace_nodes_and_values(
            self.graph, old, [old], [new], old.outputs, new.outputs
        )

    def _part(self, suffix: str, shape: tuple[int, ...] | None = None) -> ir.Value:
        """The initializer for a part, in another shape where one is given."""
        name = f"{self.value.name}{suffix}{'' if shape is None else TABLE}"
        if name not in self.graph.initializers:
            value = ir.Value(name=name)
            placement = self.file.placements[self.stored.parts[suffix]]
            place(
                value, placement if shape is None else replace(placement, shape=shape), self.file
            )
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def _misread(self, node: ir.Node) -> ConversionError:
        return ConversionError(
            f"{self.value.name} is stored as {self.storage.name}, and {node.name} ({node.op_type}) cannot read it so",
            hint="export it with --precision fp32",
        )
