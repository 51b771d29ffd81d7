"""Values of a graph held against what the reference's modules give."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from peft_deploy.parity.bisect.exposed import ExposedGraph
from peft_deploy.parity.bisect.places import Place, is_layer
from peft_deploy.parity.bisect.taps import GRAPH, Readings
from peft_deploy.parity.cases import Case
from peft_deploy.parity.compare import measure
from peft_deploy.parity.expectation import Expectation
from peft_deploy.parity.measurement import EXACT_ENOUGH
from peft_deploy.parity.play import counted, expected, token_axis
from peft_deploy.parity.tolerance import Limit, derive_limit
from peft_deploy.runtime.runner import Array
from peft_deploy.signature import GraphSignature
from peft_deploy.weights.source import FLOATING

# Of its limit. Values of good bundles stay below; what is above may hide a fault that only shows further down, so that
# the operators before it are suspected, too.
CLEARLY_GOOD = 0.5
Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a case, and what the reference says about it.

    Args:
        case: the call as a case of its own, what comes before it given.
        feeds: its inputs.
        truth: what the modules give, in float64 where that can be had.
        noise: likewise in float32, or as 16 bits would have it; the same as ``truth`` where it cannot.
        plain: likewise in float32.
        exact: whether it could.
        dtype: that the bundle computes in.
    """

    case: Case
    feeds: Mapping[str, Array]
    truth: Readings
    noise: Readings
    plain: Readings
    exact: bool
    dtype: str = EXACT_ENOUGH


@dataclass(frozen=True, eq=False)
class Wanted:
    """What is expected at a place.

    Args:
        values: of it.
        counts: where they count.
        axis: along which tokens lie; None for one value a row.
        limit: how far the graph may be off.
    """

    values: npt.NDArray[np.float32]
    counts: npt.NDArray[np.bool_]
    axis: int | None
    limit: Limit


class Judge:
    """Holds values against the reference's.

    Args:
        call: what was computed.
        expectation: what the graph's outputs have to be.
        signature: of the graph.

    Attributes:
        shares: value that was found good → how much of its limit the error takes up.
    """

    def __init__(self, call: Call, expectation: Expectation, signature: GraphSignature) -> None:
        self.call = call
        self._limits = expectation.limits
        self._specs = {spec.name: spec for spec in signature.outputs}
        self._outputs = expected(call.case, expectation.known, signature).values
        self.shares: dict[str, float] = {}

    def knows(self, place: Place) -> bool:
        """Whether the reference has anything to compare a place with."""
        return self._find(place) is not None

    def clearly_good(self, places: Iterable[Place]) -> set[str]:
        """Values of places that were found good, those near their limit left out."""
        values = {place.value for place in places}
        return {value for value in values if self.shares.get(value, 0.0) <= CLEARLY_GOOD}

    def probe(self, place: Place, graph: ExposedGraph) -> tuple[Place, bool]:
        """One place by itself: at the value that is the module's, and whether it is good."""
        found, good = self._verdict(place, graph.run(self.call.feeds, place.candidates), graph)
        return found, good is not False

    def split(
        self, places: Sequence[Place], values: Arrays, graph: ExposedGraph, sound: Sequence[Place]
    ) -> tuple[list[Place], Place | None]:
        """The places before the first bad one that are good, and that one.

        A module from which a good layer follows is not bad: PaddleNLP's gives something else there than what the
        graph keeps under its name. (Other good values prove nothing: a norm hides a wrong scale.) There is no such
        doubt about an output of the graph.

        Args:
            places: in the graph's order.
            values: of them.
            graph: that they are from.
            sound: layers that are known to be good.
        """
        verdicts = [self._verdict(place, values, graph) for place in places]
        good_layers = [*sound, *(place for place, good in verdicts if good and is_layer(place))]
        proved = graph.made_of(place.value for place in good_layers)
        before: list[Place] = []
        for place, good in verdicts:
            if good:
                before.append(place)
            elif good is False and (place.what == GRAPH or place.value not in proved):
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
        wanted = self._find(place)
        if wanted is None or wanted.values.shape != actual.shape:
            return None
        if actual.dtype.name not in FLOATING:
            return None
        actual = actual.astype(np.float32)
        if np.isnan(actual).any():
            return float("inf")  # at padding, too: it comes back through the cache
        if place.what != GRAPH:
            actual = without_padding(actual, wanted.counts)
        difference = measure(
            wanted.values, actual, wanted.counts, axis=wanted.axis, logits=False, brief=True
        )
        return wanted.limit.used(difference)

    def wanted(self, place: Place) -> Wanted:
        """What is expected at a place that was compared before."""
        found = self._find(place)
        assert found is not None
        return found

    def _find(self, place: Place) -> Wanted | None:
        case = self.call.case
        if place.what == GRAPH:
            spec, values = self._specs[place.value], self._outputs[place.value]
            return Wanted(values, counted(case, spec), token_axis(spec), self._limits[place.value])
        key = (place.module, place.what)
        counts = case.counts[:, case.given :]
        truth = self.call.truth.get(key)
        if truth is None or truth.shape[:2] != counts.shape:
            return None
        wanted = without_padding(truth, counts)
        rough = without_padding(_or(self.call.noise.get(key), truth), counts)
        exact = self.call.exact and bool(np.isfinite(wanted).all())
        if not exact:
            # PaddleNLP's mask overflows in float64 where a row is padded: then float32 is the measure
            wanted = without_padding(_or(self.call.plain.get(key), truth), counts)
        if not np.isfinite(wanted).all():
            return None
        own = measure(wanted, rough, counts, axis=1, logits=False, brief=True)
        limit = derive_limit([own], exact=exact, dtype=self.call.dtype)
        return Wanted(wanted, counts, 1, limit)


def spread(
    counts: npt.NDArray[np.bool_], axis: int | None, shape: tuple[int, ...]
) -> npt.NDArray[np.bool_]:
    """Which elements count, in the value's own shape."""
    wide = [1] * len(shape)
    wide[0] = shape[0]
    if axis is not None:
        wide[axis] = shape[axis]
    return np.ascontiguousarray(np.broadcast_to(counts.reshape(wide), shape))


def without_padding(
    values: npt.NDArray[Any], counts: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float32]:
    """Zeros at padding: what PaddleNLP has there is nobody's business, and in float64 not even a number."""
    return np.where(spread(counts, 1, values.shape), values, 0).astype(np.float32)


def _or(values: npt.NDArray[Any] | None, others: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return others if values is None else values
