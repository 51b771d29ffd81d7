"""Running texts and cases on a runner, and what a case has to give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from peft_deploy.errors import ExecutionError
from peft_deploy.parity.cases import PADDING, Case, Text
from peft_deploy.runtime.runner import Array, Runner
from peft_deploy.signature import (
    ATTENTION_MASK,
    BATCH,
    INPUT_IDS,
    LOGITS,
    PAST,
    POSITION_IDS,
    SEQUENCE,
    TOTAL,
    GraphSignature,
    past_names,
    present_names,
)
from peft_deploy.weights.source import DTYPES

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Results:
    """What a case gave, or has to give.

    Args:
        logits: of the computed slots, [B, T - given, V].
        presents: name → the cache after the last call, [B, K, T, D].
    """

    logits: Floats
    presents: Mapping[str, Floats]

    def outputs(self) -> dict[str, Floats]:
        """Every output by its name in the signature."""
        return {LOGITS: self.logits, **self.presents}


def read_text(runner: Runner, text: Text) -> Results:
    """The outputs for one text, alone, unpadded, in one call."""
    slots = np.arange(len(text), dtype=np.int64)[None]
    return run_case(runner, Case(text.name, "texts", (text,), slots, (len(text),)), {})


def expected(case: Case, known: Mapping[Text, Results]) -> Results:
    """What a case has to give at its real tokens, zeros at padding.

    Args:
        case: the arrangement.
        known: the outputs of every text.
    """
    names = next(iter(known.values())).presents
    logits = [
        _place(known[text].logits[0], row[case.given :])
        for text, row in zip(case.texts, case.slots, strict=True)
    ]
    presents = {
        name: np.stack(
            [
                _place(known[text].presents[name][0], row, axis=1)
                for text, row in zip(case.texts, case.slots, strict=True)
            ]
        )
        for name in names
    }
    return Results(np.stack(logits), presents)


def _place(values: Floats, row: npt.NDArray[np.int64], axis: int = 0) -> Floats:
    placed = np.take(values, np.maximum(row, 0), axis=axis)
    shape = [1] * values.ndim
    shape[axis] = len(row)
    return np.where((row != PADDING).reshape(shape), placed, np.float32(0))


def counted(case: Case, output: str) -> Bools:
    """Where an output counts: [B, T - given] for the logits, [B, T] for the cache."""
    return case.counts[:, case.given :] if output == LOGITS else case.counts


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
    presents = present_names(signature.num_layers)
    pasts = past_names(signature.num_layers)
    cache = dict(given) if case.given else empty_cache(signature, len(case.texts))
    ids, mask, positions = case.input_ids, case.attention_mask, case.position_ids
    logits: list[Floats] = []
    first = case.given
    for count in case.calls:
        last = first + count
        feeds: dict[str, Array] = {
            INPUT_IDS: ids[:, first:last],
            ATTENTION_MASK: mask[:, :last],
        }
        if POSITION_IDS in signature.input_names:
            feeds[POSITION_IDS] = positions[:, first:last]
        for past, present, spec in zip(pasts, presents, signature.past, strict=True):
            feeds[past] = cache[present].astype(DTYPES[spec.dtype], copy=False)
        outputs = runner.run(feeds)
        _check_shapes(signature, outputs, len(case.texts), count, last)
        logits.append(_floats(outputs[LOGITS]))
        cache = {name: _floats(outputs[name]) for name in presents}
        first = last
    return Results(np.concatenate(logits, axis=1), cache)


def given_cache(case: Case, known: Mapping[Text, Results], seed: int = 0) -> dict[str, Floats]:
    """The cache of a case's leading slots, taken from the texts.

    At padding slots stands noise, as large as the real values: attending to it must show.
    """
    rng = np.random.default_rng(seed)
    padding = ~case.counts[:, None, : case.given, None]
    cache = {}
    for name, values in expected(case, known).presents.items():
        part = values[:, :, : case.given]
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
    sizes = {BATCH: batch, SEQUENCE: new, TOTAL: total}
    for spec in signature.outputs:
        if spec.name not in outputs:
            raise ExecutionError(f"the output {spec.name} is missing")
        dims = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in spec.dims)
        if outputs[spec.name].shape != dims:
            raise ExecutionError(
                f"the output {spec.name} has shape {outputs[spec.name].shape}; it must be {dims}"
            )
