"""The values that a bundle's graph and a reference have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from peft_deploy.parity.bisect.exposed import ExposedGraph
from peft_deploy.parity.bisect.taps import GRAPH, INPUT, OUTPUT
from peft_deploy.signature import GraphSignature


@dataclass(frozen=True)
class Place:
    """A value of the graph that a module of the reference has, too.

    Args:
        value: its name.
        position: of the node that makes it, in the graph's order.
        module: path as PaddleNLP has it; of an output of the graph, that output's name.
        what: ``"output"`` or ``"input"`` of the module, or ``"graph output"``.
        others: values that may be the module's instead. PaddleNLP draws the line between a module and the scaling,
            the offset or the residual behind it in other places than the stand-in.
    """

    value: str
    position: int
    module: str
    what: str
    others: tuple[str, ...] = ()

    @property
    def candidates(self) -> tuple[str, ...]:
        """Every value that may be the module's, the likeliest first."""
        return (self.value, *self.others)


def make_places(
    graph: ExposedGraph, scopes: Mapping[str, str], signature: GraphSignature
) -> list[Place]:
    """The values that a graph and a reference have in common, in the graph's order.

    Args:
        graph: of the bundle.
        scopes: module path as PaddleNLP has it → its folder in the names of nodes.
        signature: of the graph.
    """
    found = [Place(n, graph.position(n), n, GRAPH) for n in signature.output_names]
    for module, scope in scopes.items():
        for what, place in ((OUTPUT, graph.output_of(scope)), (INPUT, graph.input_of(scope))):
            if place is not None:
                others = graph.around(scope, place[0]) if what == OUTPUT else ()
                found.append(Place(place[0], place[1], module, what, others))
    # of the modules that end in the same value, the innermost says most
    return sorted(found, key=lambda p: (p.position, p.what == INPUT, -p.module.count(".")))


def is_layer(place: Place) -> bool:
    """Whether it is the output of a layer."""
    return place.module.rpartition(".")[2].isdigit() and place.what == OUTPUT


def values_of(places: Iterable[Place]) -> list[str]:
    """Every value that may be one of theirs."""
    return [value for place in places for value in place.candidates]
