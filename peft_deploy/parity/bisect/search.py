"""The search for the first value of a graph that is not the reference's.

First the outputs of the layers, by binary search, then everything inside of the first bad one. An error does not go
away again on its way through a model, so the first bad value in the graph's order is where it came in, and what lies
between it and the good values before it is at fault.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from peft_deploy.families import NameMap
from peft_deploy.parity.bisect.activation import Activation
from peft_deploy.parity.bisect.exposed import ExposedGraph
from peft_deploy.parity.bisect.finding import Finding
from peft_deploy.parity.bisect.judge import Call, Judge, spread, without_padding
from peft_deploy.parity.bisect.layered import tapped
from peft_deploy.parity.bisect.places import Place, is_layer, make_places, values_of
from peft_deploy.parity.bisect.suspects import Suspects, narrow
from peft_deploy.parity.bisect.taps import GRAPH, Tapped
from peft_deploy.parity.cases import Case
from peft_deploy.parity.compare import measure
from peft_deploy.parity.expectation import Expectation
from peft_deploy.parity.measurement import EXACT_ENOUGH
from peft_deploy.parity.oracle import RoundableReference
from peft_deploy.parity.play import (
    Results,
    counted,
    expected,
    given_cache,
    run_case,
    token_axis,
)
from peft_deploy.parity.tolerance import is_sane
from peft_deploy.runtime.runner import Array
from peft_deploy.signature import GraphSignature, present_names


def locate(
    folder: Path,
    reference: RoundableReference,
    expectation: Expectation,
    cases: Sequence[Case],
    names: NameMap,
    dtype: str = EXACT_ENOUGH,
    active: Activation | None = None,
) -> Finding | None:
    """The first bad value of a bundle.

    Args:
        folder: the bundle, in ONNX format.
        reference: the model that was trained, whole or layer by layer.
        expectation: what it says about the texts.
        cases: that failed; the first one in which a bad value is found decides.
        names: of the model's modules.
        dtype: that the bundle computes in.
        active: what is active beside the graph, as it is in the reference.

    Returns:
        None when every value that can be compared is within its limit.

    Raises:
        ExecutionError: the graph does not run.
    """
    from peft_deploy.convert.passes.node_names import module_folder

    graph, taps = ExposedGraph(folder, active), tapped(reference)
    exact = reference.exact()
    sharp = None if exact is None else tapped(exact)
    rounded = None if dtype == EXACT_ENOUGH else tapped(reference.rounded(dtype, {}))
    scopes = {path: module_folder(names.module_to_huggingface(path)) for path in taps.paths}
    places = make_places(graph, scopes, reference.signature)
    for case in cases:
        if not reference.signature.past and _begins_late(case):
            continue  # an encoder's reference moves such rows to the left, so its modules see other places
        for call in _calls(case, taps, sharp, rounded, expectation, reference.signature):
            call = replace(call, feeds=graph.in_types(call.feeds), dtype=dtype)
            found = _search(graph, places, call, expectation, reference.signature)
            if found is not None:
                return found
    return None


def _calls(
    case: Case,
    taps: Tapped,
    sharp: Tapped | None,
    rounded: Tapped | None,
    expectation: Expectation,
    signature: GraphSignature,
) -> Iterator[Call]:
    first = case.given
    for count in case.calls:
        last = first + count
        part = replace(case, slots=case.slots[:, :last], calls=(count,), given=first)
        cache = given_cache(part, expectation.known, signature) if first else {}
        capture = _Capture(taps)
        results = run_case(capture, part, cache)
        first = last
        if not _agrees(results, part, expectation, signature):
            continue  # a model that pads in a way of its own is no measure there
        if sharp is not None:
            run_case(sharp, part, cache)
        if rounded is not None:
            run_case(rounded, part, cache)
        plain = taps.values
        truth = plain if sharp is None else sharp.values
        noise = plain if rounded is None else rounded.values
        yield Call(part, capture.feeds, truth, noise, plain, sharp is not None)


def _begins_late(case: Case) -> bool:
    """Whether padding stands before a real token."""
    counts = case.counts
    return bool((counts[:, 1:] & ~counts[:, :-1]).any())


def _agrees(
    results: Results, case: Case, expectation: Expectation, signature: GraphSignature
) -> bool:
    """Whether the reference gives what it gives for the same tokens alone and unpadded."""
    wanted = expected(case, expectation.known, signature).values
    return all(
        is_sane(
            measure(
                wanted[spec.name],
                results.values[spec.name],
                counted(case, spec),
                axis=token_axis(spec),
                logits=False,
                brief=True,
            )
        )
        for spec in signature.outputs
    )


class _Capture:
    """Keeps the inputs of the last call."""

    def __init__(self, taps: Tapped) -> None:
        self._taps = taps
        self.feeds: Mapping[str, Array] = {}

    @property
    def signature(self) -> GraphSignature:
        return self._taps.signature

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        self.feeds = feeds
        return self._taps.run(feeds, outputs)


def _search(
    graph: ExposedGraph,
    places: Sequence[Place],
    call: Call,
    expectation: Expectation,
    signature: GraphSignature,
) -> Finding | None:
    judge = Judge(call, expectation, signature)
    layers = [p for p in places if is_layer(p) and judge.knows(p)]
    good, bad = _first_bad_layer(layers, judge, graph)
    start = max((p.position for p in good), default=-1)
    if good and layers[0].value not in judge.shares:
        # Noise grows with depth, and what is near its limit proves nothing of the operators that all layers share.
        first, is_good = judge.probe(layers[0], graph)
        good += [first] if is_good else []
    if bad is None:
        # It may be behind all layers, or a cache that is handed out wrongly in any of them.
        near = [p for p in places if p.what == GRAPH or p.position > start]
    else:
        near = [p for p in places if start < p.position <= bad.position]
    fine, worst = judge.split(near, graph.run(call.feeds, values_of(near)), graph, good)
    if worst is None:
        return None
    suspects = narrow(worst, [*good, *fine], good, places, judge, graph)
    return _finding(suspects, bad, judge, graph, signature)


def _finding(
    suspects: Suspects,
    bad: Place | None,
    judge: Judge,
    graph: ExposedGraph,
    signature: GraphSignature,
) -> Finding:
    call, worst = judge.call, suspects.place
    wanted, value = judge.wanted(worst), worst.value
    actual = graph.run(call.feeds, [value])[value].astype(np.float32)
    if worst.what != GRAPH:
        actual = without_padding(actual, wanted.counts)
    difference = measure(wanted.values, actual, wanted.counts, axis=wanted.axis, logits=False)
    whole: Array = wanted.values
    counts = spread(wanted.counts, wanted.axis, whole.shape)
    if worst.what == GRAPH and value in present_names(signature.num_layers):
        whole = graph.active.with_hidden(whole)
        counts = graph.active.with_hidden(counts).astype(np.bool_)
    return Finding(
        case=call.case.name,
        layer=_layer_of(worst, bad),
        module=worst.module,
        what=worst.what,
        value=value,
        difference=difference,
        limit=wanted.limit,
        nodes=suspects.nodes,
        shared=suspects.shared,
        inputs=graph.starts_of(call.feeds, suspects.starts),
        expected=whole,
        counts=counts,
    )


def _first_bad_layer(
    layers: Sequence[Place], judge: Judge, graph: ExposedGraph
) -> tuple[list[Place], Place | None]:
    """Layers that are good, and the first that is not, by binary search; None for it when the last one is good.

    Each probe computes the graph up to one layer and no further.
    """
    good: list[Place] = []
    low, high = -1, len(layers) - 1  # low is good, high is bad
    if not layers:
        return good, None
    probe = high
    while True:
        place, is_good = judge.probe(layers[probe], graph)
        if is_good:
            good.append(place)
            low = probe
        else:
            high = probe
        if low == len(layers) - 1:
            return good, None
        if high - low == 1:
            return good, layers[high]
        probe = (low + high) // 2


def _layer_of(worst: Place, bad: Place | None) -> str | None:
    """The layer that a value is in: by its module's path, or by the layer whose output is the first bad one."""
    parts = worst.module.split(".")
    indices = [i for i, part in enumerate(parts) if part.isdigit()]
    if indices and worst.what != GRAPH:
        return ".".join(parts[: indices[0] + 1])
    return None if bad is None else bad.module
