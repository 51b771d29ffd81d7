"""Slots for LoRA: inputs beside a linear layer, empty by default, which an adapter fills at run time.

    y = x · W + bias   becomes   y = (x · W + bias) + (x · A) · B

A is [in, R] and B is [R, out], with the adapter's scaling in it; both are graph inputs and initializers at once, what
ONNX calls inputs with a default. With the default of rank 0 the second term is exactly zero. Layers that read the same
input, such as q, k and v, share one A with the columns of all of them, which their input is multiplied by in one go.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from peft_deploy.convert.linears import (
    NO_GROUPS,
    Groups,
    SameInput,
    Selection,
    by_input,
    choose_linears,
)
from peft_deploy.convert.nodes import new_node, split_sizes
from peft_deploy.convert.passes.node_names import module_folder
from peft_deploy.convert.slot_branches import (
    Default,
    EmptyDefault,
    add_branch,
    add_ranks,
    add_slot,
    begin_branches,
    split_product,
)
from peft_deploy.convert.weight_file import WeightFile
from peft_deploy.signature import LORA_A, LORA_B, LORA_RANKS
from peft_deploy.weights.source import DTYPES

_ZEROS = "slots.zeros"  # in the file of weights: what every slot of a fixed rank holds at first


@dataclass(frozen=True)
class LoraSlots:
    """The slots of a graph.

    Args:
        modules: of the layers that have them, by Hugging Face's names.
        names: of the graph's inputs, as they follow each other.
        rank: R of all layers; None where each takes any rank.
        dtype: numpy's name of their element type.
    """

    modules: tuple[str, ...]
    names: tuple[str, ...]
    rank: int | None
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form, for the manifest."""
        return {
            "targets": list(self.modules),
            "names": list(self.names),
            "rank": self.rank,
            "dtype": self.dtype,
        }


class AddLoraSlotsPass(ir.passes.InPlacePass):
    """Adds ``MODULE.lora_A.weight`` [in, rank] and ``MODULE.lora_B.weight`` [rank, out] to chosen linear layers.

    Those of them that read the same input have one A [in, sum of their ranks], called after all of them, and
    ``….lora_A.ranks`` [layers], int64, which says how many of its columns are whose. With a fixed rank there is none.

    Precondition: weights are bound, and go by Hugging Face's names. Postcondition: the graph's other inputs and its
    outputs are what they were; without an adapter so is every result, bit by bit.

    Each layer's rank is a dimension of its own: onnxruntime reuses buffers of the same symbolic shape, and refuses
    to run where two layers call their ranks alike and an adapter gives them different ones.

    Args:
        select: which linear layers get slots.
        file: of the weights; gets the zeros of a fixed rank.
        rank: R for runtimes that take no empty tensors; None leaves it open.
        groups: layers that read the same input, and are one packed linear layer in some graphs.

    Attributes:
        added: the slots, after the pass has run.

    Raises:
        ConversionError: the linear layers are of several element types.
    """

    def __init__(
        self,
        select: Selection,
        file: WeightFile,
        rank: int | None = None,
        groups: Groups = NO_GROUPS,
    ) -> None:
        super().__init__()
        self._groups = groups
        self._select = select
        self._file = file
        self._rank = rank
        self.added: LoraSlots | None = None

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Inserts three nodes a layer, or two and for layers that share an A two more."""
        graph = model.graph
        chosen, dtype = choose_linears(graph, self._select, self._groups)
        shared = by_input(chosen, self._groups)
        default = self._defaults(shared, dtype)
        names: list[str] = []
        for group in shared:
            rank = self._rank
            width = f"{group.name}.rank" if rank is None else rank * len(group.linears)
            A = add_slot(graph, group.name + LORA_A, (group.in_size, width), default)
            names.append(group.name + LORA_A)
            product = new_node("MatMul", [group.input, A], f"{module_folder(group.name)}/lora_A")
            begin_branches(graph, group, [product])
            parts = [product.outputs[0]]
            if len(group.linears) > 1:
                if rank is None:
                    sizes = add_ranks(graph, group)
                    names.append(group.name + LORA_RANKS)
                else:
                    sizes = split_sizes(graph, [rank] * len(group.linears))
                parts = split_product(graph, group, product.outputs[0], sizes)
            for (module, linear), part in zip(group.linears.items(), parts, strict=True):
                dims = (f"{module}.rank" if rank is None else rank, linear.shape[1])
                B = add_slot(graph, module + LORA_B, dims, default)
                names.append(module + LORA_B)
                folder = module_folder(module)
                add_branch(
                    graph, linear, [new_node("MatMul", [part, B], f"{folder}/lora_B")], folder
                )
        self.added = LoraSlots(tuple(chosen), tuple(names), self._rank, dtype)
        return ir.passes.PassResult(model, modified=bool(chosen))

    def _defaults(self, shared: Sequence[SameInput], dtype: str) -> Default:
        """Empty tensors in the graph itself; or zeros, which all slots share and the file holds once."""
        if self._rank is None:
            return EmptyDefault(DTYPES[dtype])
        widths = [group.in_size * len(group.linears) for group in shared]
        widths += [linear.shape[1] for group in shared for linear in group.linears.values()]
        self._file.add(_ZEROS, np.zeros(max(widths, default=0) * self._rank, DTYPES[dtype]))
        return _ZeroDefault(self._file, DTYPES[dtype])


@dataclass(frozen=True)
class _ZeroDefault:
    file: WeightFile
    dtype: np.dtype[Any]

    def __call__(self, name: str, dims: tuple[int | str, ...]) -> ir.TensorProtocol:
        sizes = [int(dim) for dim in dims]
        return ir.ExternalTensor(
            self.file.path.name,
            self.file.placements[_ZEROS].offset,
            math.prod(sizes) * self.dtype.itemsize,
            ir.DataType.from_numpy(self.dtype),
            shape=ir.Shape(sizes),
            name=name,
            base_dir=self.file.path.parent,
        )
