"""The search for the first value of a graph that is not the reference's.

First the outputs of the layers, then everything inside of the first bad one: two runs of the graph. An error does not
go away again on its way through a model, so the first bad value in the graph's order is where it came in, and what
lies between it and the good values before it is at fault.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from peft_deploy.families import NameMap
from peft_deploy.parity.bisect.activation import Activation
from peft_deploy.parity.bisect.exposed import ExposedGraph, Place, make_places
from peft_deploy.parity.bisect.finding import Finding
from peft_deploy.parity.bisect.taps import GRAPH, OUTPUT, Taps
from peft_deploy.parity.cases import Case
from peft_deploy.parity.compare import measure
from peft_deploy.parity.expectation import Expectation
from peft_deploy.parity.measurement import EXACT_ENOUGH
from peft_deploy.parity.play import (
    Results,
    counted,
    expected,
    given_cache,
    run_case,
    token_axis,
)
from peft_deploy.parity.tolerance import Limit, derive_limit, is_sane
from peft_deploy.runtime.runner import Array
from peft_deploy.signature import GraphSignature, present_names
from peft_deploy.weights.source import FLOATING

# Of its limit. Values of good bundles stay below; what is above may hide a fault that only shows further down, so that
# the operators before it are suspected, too.
CLEARLY_GOOD = 0.5
Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a case, and what the reference says about it.

    Args:
        case: the call as a case of its own, what comes before it given.
        feeds: its inputs.
        truth: (module, what) → value, in float64 where that can be had.
        noise: likewise in float32, or as 16 bits would have it; the same arrays as ``truth`` where it cannot.
        plain: likewise in float32.
        exact: whether it could.
        dtype: that the bundle computes in.
    """

    case: Case
    feeds: Mapping[str, Array]
    truth: Mapping[tuple[str, str], npt.NDArray[Any]]
    noise: Mapping[tuple[str, str], npt.NDArray[Any]]
    plain: Mapping[tuple[str, str], npt.NDArray[Any]]
    exact: bool
    dtype: str = EXACT_ENOUGH


def locate(
    folder: Path,
    reference: Any,
    expectation: Expectation,
    cases: Sequence[Case],
    names: NameMap,
    dtype: str = EXACT_ENOUGH,
    active: Activation | None = None,
) -> Finding | None:
    """The first bad value of a bundle.

    Args:
        folder: the bundle, in ONNX format.
        reference: the model that was trained, a ``PaddleReference``.
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

    graph, taps = ExposedGraph(folder, active), Taps(reference)
    exact = reference.exact()
    sharp = None if exact is None else Taps(exact)
    rounded = None if dtype == EXACT_ENOUGH else Taps(reference.rounded(dtype, {}))
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
    taps: Taps,
    sharp: Taps | None,
    rounded: Taps | None,
    expectation: Expectation,
    signature: GraphSignature,
) -> Iterator[_Call]:
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
        truth = taps.values if sharp is None else sharp.values
        noise = taps.values if rounded is None else rounded.values
        yield _Call(part, capture.feeds, truth, noise, taps.values, sharp is not None)


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

    def __init__(self, taps: Taps) -> None:
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
    call: _Call,
    expectation: Expectation,
    signature: GraphSignature,
) -> Finding | None:
    judge = _Judge(call, expectation, signature)
    layers = [p for p in places if _is_layer(p) and judge.knows(p)]
    good, bad = _first_bad_layer(layers, judge, graph)
    start, end = max((p.position for p in good), default=-1), bad.position if bad else -1
    if bad is None:
        # It may be behind all layers, or a cache that is handed out wrongly in any of them.
        outer = [p for p in places if p.what == GRAPH or p.position > start]
        _, late = judge.split(outer, graph.run(call.feeds, _values(outer)), graph)
        if late is None:
            return None
        end = late.position
        start = max((p.position for p in layers if p.position < end), default=-1)
        good += [p for p in layers if p.position == start]  # what follows is good, so it is, too
    inner = [p for p in places if start < p.position <= end]
    values = graph.run(call.feeds, _values(inner))
    fine, worst = judge.split(inner, values, graph)
    if worst is None:
        return None
    stops = {p.value for p in (*good, *fine) if judge.shares.get(p.value, 0.0) <= CLEARLY_GOOD}
    if graph.active.hidden:  # of these only what is visible from outside was compared
        stops -= set(present_names(signature.num_layers))
    nodes, starts = graph.between(worst.value, stops)
    inputs = graph.starts_of(call.feeds, starts)
    wanted, counts, axis, limit = judge.measures(worst)
    actual = values[worst.value].astype(np.float32)
    if worst.what != GRAPH:
        actual = _without_padding(actual, counts)
    difference = measure(wanted, actual, counts, axis=axis, logits=False)
    whole: Array = wanted
    spread = _spread(counts, axis, wanted.shape)
    if worst.what == GRAPH and worst.value in present_names(signature.num_layers):
        whole = graph.active.with_hidden(whole)
        spread = graph.active.with_hidden(spread).astype(np.bool_)
    return Finding(
        case=call.case.name,
        layer=_layer_of(worst, bad, graph),
        module=worst.module,
        what=worst.what,
        value=worst.value,
        difference=difference,
        limit=limit,
        nodes=nodes,
        inputs=inputs,
        expected=whole,
        counts=spread,
    )


def _first_bad_layer(
    layers: Sequence[Place], judge: _Judge, graph: ExposedGraph
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


def _is_layer(place: Place) -> bool:
    return place.module.rpartition(".")[2].isdigit() and place.what == OUTPUT


def _values(places: Iterable[Place]) -> list[str]:
    return [value for place in places for value in place.candidates]


def _layer_of(worst: Place, bad: Place | None, graph: ExposedGraph) -> str | None:
    """The layer that a value is in: by its module's path, or by the layer whose output is the first bad one."""
    parts = worst.module.split(".")
    indices = [i for i, part in enumerate(parts) if part.isdigit()]
    if indices and worst.what != GRAPH:
        return ".".join(parts[: indices[0] + 1])
    return None if bad is None else bad.module


def _spread(
    counts: npt.NDArray[np.bool_], axis: int | None, shape: tuple[int, ...]
) -> npt.NDArray[np.bool_]:
    """Which elements count, in the value's own shape."""
    wide = [1] * len(shape)
    wide[0] = shape[0]
    if axis is not None:
        wide[axis] = shape[axis]
    return np.ascontiguousarray(np.broadcast_to(counts.reshape(wide), shape))


def _without_padding(
    values: npt.NDArray[Any], counts: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float32]:
    """Zeros at padding: what PaddleNLP has there is nobody's business, and in float64 not even a number."""
    return np.where(_spread(counts, 1, values.shape), values, 0).astype(np.float32)


class _Judge:
    """Holds values against the reference's.

    Args:
        call: what was computed.
        expectation: what the graph's outputs have to be.
        signature: of the graph.
    """

    def __init__(self, call: _Call, expectation: Expectation, signature: GraphSignature) -> None:
        self._call = call
        self._limits = expectation.limits
        self._specs = {spec.name: spec for spec in signature.outputs}
        self._outputs = expected(call.case, expectation.known, signature).values
        self.shares: dict[str, float] = {}

    def knows(self, place: Place) -> bool:
        """Whether the reference has anything to compare a place with."""
        return self._find(place) is not None

    def probe(self, place: Place, graph: ExposedGraph) -> tuple[Place, bool]:
        """One place by itself: at the value that is the module's, and whether it is good."""
        found, good = self._verdict(place, graph.run(self._call.feeds, place.candidates), graph)
        return found, good is not False

    def split(
        self, places: Sequence[Place], values: Arrays, graph: ExposedGraph
    ) -> tuple[list[Place], Place | None]:
        """The places before the first bad one that are good, and that one.

        A place from which a good layer follows is not bad: there, PaddleNLP's module gives something else than what
        the graph keeps under its name. (Other good values prove nothing: a norm hides a wrong scale.)
        """
        verdicts = [self._verdict(place, values, graph) for place in places]
        sound = [place for place, good in verdicts if good and _is_layer(place)]
        before: list[Place] = []
        for place, good in verdicts:
            if good:
                before.append(place)
            elif good is False and not any(
                later.position > place.position and graph.depends(later.value, place.value)
                for later in sound
            ):
                return before, place
        return before, None

    def _verdict(
        self, place: Place, values: Arrays, graph: ExposedGraph
    ) -> tuple[Place, bool | None]:
        """The place at the value that is the module's, if there is one, and whether it is good."""
        for value in place.candidates:
            share = self._share(place, values[value])
            if share is not None and share <= 1:
                self.shares[value] = share
                return replace(place, value=value, position=graph.position(value)), True
        share = self._share(place, values[place.value])
        return place, None if share is None else False

    def _share(self, place: Place, actual: npt.NDArray[Any]) -> float | None:
        """How much of its limit the error takes up; None where the two have not the same form."""
        found = self._find(place)
        if found is None or found[0].shape != actual.shape or actual.dtype.name not in FLOATING:
            return None
        wanted, counts, axis, limit = found
        actual = actual.astype(np.float32)
        if np.isnan(actual).any():
            return float("inf")  # at padding, too: it comes back through the cache
        if place.what != GRAPH:
            actual = _without_padding(actual, counts)
        difference = measure(wanted, actual, counts, axis=axis, logits=False, brief=True)
        return limit.used(difference)

    def measures(
        self, place: Place
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_], int | None, Limit]:
        """What is expected at a place, where it counts, along which axis, and how far it may be off."""
        found = self._find(place)
        assert found is not None  # it was compared before
        return found

    def _find(
        self, place: Place
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_], int | None, Limit] | None:
        case = self._call.case
        if place.what == GRAPH:
            spec = self._specs[place.value]
            limit = self._limits[place.value]
            return self._outputs[place.value], counted(case, spec), token_axis(spec), limit
        key = (place.module, place.what)
        counts = case.counts[:, case.given :]
        if key not in self._call.truth or self._call.truth[key].shape[:2] != counts.shape:
            return None
        wanted = _without_padding(self._call.truth[key], counts)
        rough = _without_padding(self._call.noise.get(key, self._call.truth[key]), counts)
        exact = self._call.exact and bool(np.isfinite(wanted).all())
        if not exact:
            # PaddleNLP's mask overflows in float64 where a row is padded: then float32 is the measure
            wanted = _without_padding(self._call.plain.get(key, self._call.truth[key]), counts)
        if not np.isfinite(wanted).all():
            return None
        own = measure(wanted, rough, counts, axis=1, logits=False, brief=True)
        limit = derive_limit([own], exact=exact, dtype=self._call.dtype)
        return wanted, counts, 1, limit
