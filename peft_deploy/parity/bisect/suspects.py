"""Which operators may be at fault for a bad value: as few as explain it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peft_deploy.parity.bisect.exposed import ExposedGraph
from peft_deploy.parity.bisect.judge import Judge
from peft_deploy.parity.bisect.places import Place, values_of


@dataclass(frozen=True, eq=False)
class Suspects:
    """What explains a bad value.

    Args:
        place: the bad value: the earliest one that was found among those that the first find is made of.
        nodes: operators that may be at fault.
        starts: values that they start from.
        shared: operators before those whose results good layers are made of, too.
    """

    place: Place
    nodes: list[str]
    starts: list[str]
    shared: list[str]


def narrow(
    worst: Place,
    good: Sequence[Place],
    layers: Sequence[Place],
    places: Sequence[Place],
    judge: Judge,
    graph: ExposedGraph,
) -> Suspects:
    """The operators between a bad value and the good ones before it.

    The search has looked at the places around the first bad layer, or behind the last one. What the bad value is made
    of may lie elsewhere (a cache that is handed out wrongly comes out of a good layer), so every place among the
    suspected operators is looked at, until no more are left out for it.

    Args:
        worst: the bad value.
        good: places that were found good.
        layers: those of them that are outputs of layers.
        places: all that there are.
        judge: that found them.
        graph: that they are from.
    """
    good, seen = list(good), set[tuple[str, str]]()
    while True:
        nodes, starts = graph.between(worst.value, _stops(good, judge, graph))
        made = graph.made_by(nodes) - {worst.value}
        inside = [p for p in places if p.value in made and (p.module, p.what) not in seen]
        if not inside:
            break
        seen |= {(p.module, p.what) for p in inside}
        values = graph.run(judge.call.feeds, values_of(inside))
        fine, earlier = judge.split(inside, values, graph, layers)
        good += fine
        if earlier is not None:
            worst = earlier
    return _leave_out_shared(Suspects(worst, nodes, starts, []), good, layers, judge, graph)


def _stops(good: Sequence[Place], judge: Judge, graph: ExposedGraph) -> set[str]:
    """Values before which nothing is suspected."""
    stops = judge.clearly_good(good)
    if graph.active.hidden:  # of these only what is visible from outside was compared
        stops -= graph.caches
    return stops


def _leave_out_shared(
    found: Suspects,
    good: Sequence[Place],
    layers: Sequence[Place],
    judge: Judge,
    graph: ExposedGraph,
) -> Suspects:
    """The same without the operators that clearly good layers need as well, such as those that make the mask.

    The operator that makes the bad value stays: its other results may be good, and this one handed out wrongly.
    """
    used = graph.made_of(judge.clearly_good(layers))
    nodes, starts = graph.between(found.place.value, used | _stops(good, judge, graph))
    left = set(nodes)
    return Suspects(found.place, nodes, starts, [n for n in found.nodes if n not in left])
