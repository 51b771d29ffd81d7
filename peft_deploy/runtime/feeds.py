"""Whether a set of inputs fits a signature, checked before a runtime gets to see it.

A runtime's own message about a wrong shape names a node deep inside the graph, and some mistakes
(a negative token id) it does not notice at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from peft_deploy.errors import ExecutionError, listed
from peft_deploy.runtime.runner import Array
from peft_deploy.signature import (
    ADAPTER_IDS,
    ATTENTION_MASK,
    ENCODER_INPUT_IDS,
    INPUT_IDS,
    LOGITS,
    POSITION_IDS,
    TOKEN_TYPE_IDS,
    GraphSignature,
    TensorSpec,
)


def check_feeds(
    signature: GraphSignature, feeds: Mapping[str, Array], positions: int | None = None
) -> None:
    """Passes when the feeds are what the signature asks for.

    Args:
        signature: of the graph.
        feeds: the inputs by name.
        positions: how many positions the model has; None when that is not known.

    Raises:
        ExecutionError: a missing or unexpected name, a wrong dtype or rank, a dimension that is
            not the static one or not the same for every input that shares its symbol, or an
            index outside its table.
    """
    _check_names(signature, feeds)
    sizes: dict[str, tuple[int, str]] = {}  # symbol → size, input that fixed it
    for spec in signature.inputs:
        array = feeds[spec.name]
        _check_form(spec, array)
        for axis, dim in enumerate(spec.dims):
            if isinstance(dim, str) and "+" not in dim:
                size, source = sizes.setdefault(dim, (array.shape[axis], spec.name))
                if size != array.shape[axis]:
                    raise ExecutionError(
                        f"input {spec.name} has {dim} = {array.shape[axis]} (shape "
                        f"{list(array.shape)}); "
                        f"{source} has {dim} = {size}"
                    )
    for spec in signature.inputs:
        _check_sums(spec, feeds[spec.name], sizes)
    check_indices(signature, feeds, positions)
    _check_length(signature, feeds, positions)


def requested_outputs(
    signature: GraphSignature, outputs: Sequence[str] | None, what: str = "graph"
) -> list[str]:
    """The names of the outputs to compute: those that were asked for, all when None.

    Args:
        signature: of the graph.
        outputs: what was asked for.
        what: has the outputs, for the message.

    Raises:
        ExecutionError: there is no such output.
    """
    known = signature.output_names
    names = known if outputs is None else list(outputs)
    if unknown := set(names) - set(known):
        raise ExecutionError(
            f"the {what} has no such outputs:\n{listed(unknown)}\nits outputs are:\n{listed(known)}"
        )
    return names


def _check_length(
    signature: GraphSignature, feeds: Mapping[str, Array], positions: int | None
) -> None:
    """An encoder's positions follow from the mask."""
    if positions is None or signature.past or POSITION_IDS in feeds or ATTENTION_MASK not in feeds:
        return
    lengths = feeds[ATTENTION_MASK].astype(bool).sum(axis=-1)
    if lengths.size and int(lengths.max()) > positions:
        raise ExecutionError(
            f"row {int(lengths.argmax())} has {int(lengths.max())} tokens; the model has "
            f"{positions} positions"
        )


def check_indices(
    signature: GraphSignature, feeds: Mapping[str, Array], positions: int | None = None
) -> None:
    """Passes when every token id and every position is one that the model has.

    A graph counts negative ones from the end of its table. What it makes of those past the end is
    up to the provider: an error on the CPU, zeros on a GPU.

    Args:
        signature: of the graph.
        feeds: the inputs by name.
        positions: how many positions the model has; None when that is not known.

    Raises:
        ExecutionError: one of them is not.
    """
    known = _vocabulary(signature)
    limits = {INPUT_IDS: known, ENCODER_INPUT_IDS: known, POSITION_IDS: positions}
    limits[TOKEN_TYPE_IDS] = None
    for name, limit in limits.items():
        if name not in feeds or not feeds[name].size:
            continue
        lowest, highest = int(feeds[name].min()), int(feeds[name].max())
        if lowest < 0:
            raise ExecutionError(
                f"input {name} holds the negative value {lowest}; it counts from 0"
            )
        if limit is not None and highest >= limit:
            raise ExecutionError(
                f"input {name} holds the value {highest}; the last that the model has is {limit - 1}"
            )


def check_adapter_ids(ids: Array, batch: int, entries: int) -> None:
    """Passes when every row of a batch names an entry of the bank.

    A graph counts negative ids from the bank's end, without a word.

    Args:
        ids: int64 [B]; 0 for a row without an adapter.
        batch: B of the other inputs.
        entries: of the bank, that of no adapter included.

    Raises:
        ExecutionError: another type or number of ids, or one outside the bank.
    """
    if ids.dtype != np.int64 or ids.ndim != 1:
        raise ExecutionError(
            f"input {ADAPTER_IDS} is {ids.dtype.name} {list(ids.shape)}; it must be int64 [batch]"
        )
    if len(ids) != batch:
        raise ExecutionError(
            f"adapters were named for {len(ids)} rows, and the batch has {batch}",
            hint="name one a row, None for a row without an adapter",
        )
    outside = ids[~np.isin(ids, np.arange(entries))]
    if outside.size:
        raise ExecutionError(
            f"input {ADAPTER_IDS} holds the value {int(outside[0])}; the bank has the ids 0 (no adapter) to "
            f"{entries - 1}",
            hint="a session knows its adapters by name: adapters=[…]",
        )


def _vocabulary(signature: GraphSignature) -> int | None:
    """How many tokens a decoder knows; None for other models, whose logits are of something else."""
    for spec in signature.outputs if signature.past else ():
        if spec.name == LOGITS and isinstance(spec.dims[-1], int):
            return spec.dims[-1]
    return None


def _check_names(signature: GraphSignature, feeds: Mapping[str, Array]) -> None:
    missing = set(signature.input_names) - set(feeds)
    unexpected = set(feeds) - set(signature.input_names)
    if missing:
        raise ExecutionError(f"inputs are missing:\n{listed(missing)}")
    if unexpected:
        raise ExecutionError(
            f"the graph has no such inputs:\n{listed(unexpected)}\n"
            f"its inputs are:\n{listed(signature.input_names)}"
        )


def _check_form(spec: TensorSpec, array: Array) -> None:
    if array.dtype.name != spec.dtype:
        raise ExecutionError(f"input {spec.name} is {array.dtype.name}; it must be {spec.dtype}")
    if array.ndim != len(spec.dims):
        raise ExecutionError(
            f"input {spec.name} has {array.ndim} dimensions (shape {list(array.shape)}); "
            f"it must have {len(spec.dims)}: {_dims(spec)}"
        )
    for axis, dim in enumerate(spec.dims):
        if isinstance(dim, int) and array.shape[axis] != dim:
            raise ExecutionError(
                f"input {spec.name} has shape {list(array.shape)}; dimension {axis} must be "
                f"{dim}: "
                f"{_dims(spec)}"
            )


def _check_sums(spec: TensorSpec, array: Array, sizes: Mapping[str, tuple[int, str]]) -> None:
    """Dimensions such as ``past+sequence``, as far as their terms are known."""
    for axis, dim in enumerate(spec.dims):
        if not isinstance(dim, str) or "+" not in dim:
            continue
        terms = [term.strip() for term in dim.split("+")]
        if not all(term.isdigit() or term in sizes for term in terms):
            continue
        total = sum(int(term) if term.isdigit() else sizes[term][0] for term in terms)
        if array.shape[axis] != total:
            reasons = [f"{t} = {sizes[t][0]} in {sizes[t][1]}" for t in terms if t in sizes]
            raise ExecutionError(
                f"input {spec.name} has shape {list(array.shape)}; dimension {axis} is {dim} and "
                f"must be {total} "
                f"({', '.join(reasons)})"
            )


def _dims(spec: TensorSpec) -> str:
    return "[" + ", ".join(str(dim) for dim in spec.dims) + "]"
