"""Running texts and cases on a runner, and what a case has to give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from peft_deploy.errors import ExecutionError
from peft_deploy.parity.cases import PADDING, Case, Text
from peft_deploy.runtime.runner import Array, Runner
from peft_deploy.signature import (
    ATTENTION_MASK,
    BATCH,
    ENCODER_ATTENTION_MASK,
    ENCODER_INPUT_IDS,
    INPUT_IDS,
    LOGITS,
    PAST,
    POSITION_IDS,
    SEQUENCE,
    SOURCE,
    TOKEN_TYPE_IDS,
    TOTAL,
    GraphSignature,
    TensorSpec,
    present_names,
)
from peft_deploy.weights.source import DTYPES

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Results:
    """What a case gave, or has to give.

    Args:
        values: output → array. Outputs with one value a new token are those of all calls, [B, T - given, …];
            the cache and outputs with one value a row are those of the last call, [B, K, T, D] and [B, …]; the logits
            of last tokens alone are those of all calls, [B, calls, V].
    """

    values: Mapping[str, Floats]

    @property
    def logits(self) -> Floats:
        """[B, T - given, V] of a decoder."""
        return self.values[LOGITS]

    def outputs(self) -> dict[str, Floats]:
        """Every output by its name in the signature."""
        return dict(self.values)


def token_axis(spec: TensorSpec) -> int | None:
    """The axis of an output along which tokens lie; None where it has one value a row."""
    if spec.is_last_logits:
        return 1  # those of several calls side by side
    return next(
        (axis for axis, dim in enumerate(spec.dims) if dim in (SEQUENCE, SOURCE, TOTAL)), None
    )


def read_text(runner: Runner, text: Text) -> Results:
    """The outputs for one text, alone, unpadded, in one call where that gives those of every token."""
    slots = np.arange(len(text), dtype=np.int64)[None]
    # Every token counts here, also to a runner that gives a call's last one only.
    calls = (1,) * len(text) if runner.signature.last_logits else (len(text),)
    return run_case(runner, Case(text.name, "texts", (text,), slots, calls), {})


def expected(case: Case, known: Mapping[Text, Results], signature: GraphSignature) -> Results:
    """What a case has to give at its real tokens, zeros at padding.

    Args:
        case: the arrangement.
        known: the outputs of every text.
        signature: says where tokens lie in an output.
    """
    values = {}
    for spec in signature.outputs:
        axis, columns = token_axis(spec), _columns(case, spec)
        rows = [known[text].values[spec.name][0] for text in case.texts]
        if axis is not None:
            slots = case.slots[:, columns]
            rows = [_place(row, s, axis - 1) for row, s in zip(rows, slots, strict=True)]
        values[spec.name] = np.stack(rows)
    return Results(values)


def _place(values: Floats, row: npt.NDArray[np.int64], axis: int = 0) -> Floats:
    placed = np.take(values, np.maximum(row, 0), axis=axis)
    shape = [1] * values.ndim
    shape[axis] = len(row)
    return np.where((row != PADDING).reshape(shape), placed, np.float32(0))


def counted(case: Case, spec: TensorSpec) -> Bools:
    """Where an output counts: [B, T - given] for one value a new token, [B, T] for the cache, [B, calls] for the
    logits of each call's last token, [B] for one value a row.
    """
    if token_axis(spec) is None:
        return np.ones(len(case.texts), np.bool_)
    return case.counts[:, _columns(case, spec)]


def _columns(case: Case, spec: TensorSpec) -> npt.NDArray[np.int64]:
    """The places of a case that an output has values for."""
    places = np.arange(case.slots.shape[1], dtype=np.int64)
    if TOTAL in spec.dims:
        return places
    return case.given + np.cumsum(case.calls) - 1 if spec.is_last_logits else places[case.given :]


def run_case(runner: Runner, case: Case, given: Mapping[str, Floats]) -> Results:
    """Computes a case, call by call, each on the cache of the one before.

    Args:
        runner: either side.
        case: the arrangement.
        given: present name → the cache of the leading slots, as :func:`given_cache` makes it;
            empty when the case has none.

    Raises:
        ExecutionError: an output is missing or has another shape than the signature says.
    """
    signature = runner.signature
    cache = dict(given) if case.given else empty_cache(signature, len(case.texts))
    parts: dict[str, list[Floats]] = {spec.name: [] for spec in signature.outputs}
    first = case.given
    for count in case.calls:
        last = first + count
        outputs = runner.run(_feeds(signature, case, first, last, cache))
        _check_shapes(signature, outputs, len(case.texts), count, last)
        for name, arrays in parts.items():
            arrays.append(_floats(outputs[name]))
        cache = {name: parts[name][-1] for name in present_names(signature.num_layers)}
        first = last
    return Results({spec.name: _joined(spec, parts[spec.name]) for spec in signature.outputs})


def _feeds(
    signature: GraphSignature, case: Case, first: int, last: int, cache: Mapping[str, Floats]
) -> dict[str, Array]:
    """The inputs of the call that computes the slots from ``first`` up to ``last``."""
    known: dict[str, Array] = {
        INPUT_IDS: case.input_ids[:, first:last],
        ATTENTION_MASK: case.attention_mask[:, :last],
        POSITION_IDS: case.position_ids[:, first:last],
        TOKEN_TYPE_IDS: case.token_type_ids[:, first:last],
    }
    if ENCODER_INPUT_IDS in signature.input_names:
        known |= {ENCODER_INPUT_IDS: case.source_ids, ENCODER_ATTENTION_MASK: case.source_mask}
    presents = present_names(signature.num_layers)
    for spec, present in zip(signature.past, presents, strict=True):
        known[spec.name] = cache[present].astype(DTYPES[spec.dtype], copy=False)
    return {name: known[name] for name in signature.input_names}


def _joined(spec: TensorSpec, calls: Sequence[Floats]) -> Floats:
    axis = token_axis(spec)
    if axis is None or TOTAL in spec.dims:
        return calls[-1]
    return np.concatenate(calls, axis=axis)


def given_cache(
    case: Case, known: Mapping[Text, Results], signature: GraphSignature, seed: int = 0
) -> dict[str, Floats]:
    """The cache of a case's leading slots, taken from the texts.

    At padding slots stands noise, as large as the real values: attending to it must show.
    """
    rng = np.random.default_rng(seed)
    padding = ~case.counts[:, None, : case.given, None]
    wanted = expected(case, known, signature).values
    cache = {}
    for name in present_names(signature.num_layers):
        part = wanted[name][:, :, : case.given]
        junk = (1 + float(np.abs(part).max())) * rng.standard_normal(part.shape)
        cache[name] = np.where(padding, junk, part).astype(np.float32)
    return cache


def empty_cache(signature: GraphSignature, batch: int) -> dict[str, Floats]:
    """Present name → a cache of no tokens, [B, K, 0, D]."""
    names = present_names(signature.num_layers)
    sizes = {BATCH: batch, PAST: 0}
    return {
        name: np.zeros(
            [sizes[dim] if isinstance(dim, str) else dim for dim in spec.dims], np.float32
        )
        for name, spec in zip(names, signature.past, strict=True)
    }


def _floats(array: Array) -> Floats:
    # float32 holds what float64 says to 6e-8 of the value: far below any limit that the check
    # sets.
    return array.astype(np.float32, copy=False)


def _check_shapes(
    signature: GraphSignature, outputs: Mapping[str, Array], batch: int, new: int, total: int
) -> None:
    sizes = {BATCH: batch, SEQUENCE: new, SOURCE: new, TOTAL: total}
    for spec in signature.outputs:
        if spec.name not in outputs:
            raise ExecutionError(f"the output {spec.name} is missing")
        dims = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in spec.dims)
        if outputs[spec.name].shape != dims:
            raise ExecutionError(
                f"the output {spec.name} has shape {outputs[spec.name].shape}; it must be {dims}"
            )
