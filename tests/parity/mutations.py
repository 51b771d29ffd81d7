"""Deliberate faults, each put into a copy of a good bundle.

A case of the gate has to see every one of them, and the search has to find those in a graph where they are. The few
that no case can see are here as well, marked as such; comparing the bundle's files with the checkpoint sees these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bundle_edits import Edit, GraphEdit
from mutation_subjects import Subject, Verdict

from peft_deploy.parity.bisect import Finding

Break = Callable[[Subject, Path], None]


@dataclass(frozen=True)
class Mutation:
    """A fault.

    Args:
        name: what is wrong, in words; unique.
        subject: the bundle that it is put into.
        apply: changes a copy of the bundle.
        node: an operator that the search has to suspect; empty where it cannot look.
        layer: the layer that it has to name; None for faults that are in no layer, or in all.
        seen: whether a case can see it; what none can see has to be seen in the bundle's files.
        runs: whether the graph still runs in every case.
        cancels: whether a layer that needs the operator gives the right numbers all the same (turning q and k alike
            leaves their products as they were): the search then names it among those that good layers use, too.
        file: a tensor of a file beside the graph, or one of blocks, that the search has to name as wrong.
    """

    name: str
    subject: str
    apply: Break
    node: str = ""
    layer: str | None = None
    seen: bool = True
    runs: bool = True
    cancels: bool = False
    file: str = ""


def complaints(mutation: Mutation, verdict: Verdict) -> list[str]:
    """What the gate and the search should have said of a fault and did not; empty when all is well."""
    report, found = verdict.report, verdict.finding
    wrong = []
    if report.passed is mutation.seen:
        said = "passed" if report.passed else "failed"
        wrong.append(f"{mutation.name}: the bundle {said}; {report.summary()}")
    if not mutation.seen and verdict.files is None:
        wrong.append(f"{mutation.name}: the files are said to be right")
    if mutation.seen and not mutation.runs and not any(case.problem for case in report.cases):
        wrong.append(f"{mutation.name}: the graph runs in every case")
    if mutation.file and (found is None or mutation.file not in [w.name for w in found.weights]):
        wrong.append(f"{mutation.name}: {mutation.file} is not found, but {found}")
    if mutation.layer and (found is None or found.layer != mutation.layer):
        wrong.append(f"{mutation.name}: it is not found in {mutation.layer}, but {found}")
    if mutation.node and (
        found is None
        or not _is_suspected(mutation, found)
        or mutation.layer not in (None, found.layer)
    ):
        wrong.append(f"{mutation.name}: {mutation.node} is not found, but {found}")
    return wrong


def _is_suspected(mutation: Mutation, found: Finding) -> bool:
    """Whether an operator is named; of a packed layer's part, which has none of its own, whether its result is."""
    if mutation.cancels:
        return mutation.node in found.shared
    return mutation.node in found.nodes or found.value.startswith(f"{mutation.node}_output")


def in_graph(*edits: Edit) -> Break:
    """Changes of the graph and its weights."""

    def apply(_: Subject, folder: Path) -> None:
        graph = GraphEdit(folder)
        for edit in edits:
            edit(graph)
        graph.save()

    return apply


def with_subject(edit: Callable[[Subject, GraphEdit], None]) -> Break:
    """A change of the graph for which one has to know what the bundle was made of."""

    def apply(subject: Subject, folder: Path) -> None:
        graph = GraphEdit(folder)
        edit(subject, graph)
        graph.save()

    return apply


def catalogue() -> list[Mutation]:
    """All faults, in the order of the document."""
    from mutations_adapter import ADAPTER_MUTATIONS, FILE_MUTATIONS
    from mutations_decoder import GRAPH_MUTATIONS
    from mutations_families import FAMILY_MUTATIONS
    from mutations_positions import POSITION_MUTATIONS
    from mutations_quantized import QUANTIZED_MUTATIONS
    from mutations_steps import STEP_MUTATIONS
    from mutations_weights import WEIGHT_MUTATIONS

    return [
        *ADAPTER_MUTATIONS,
        *WEIGHT_MUTATIONS,
        *GRAPH_MUTATIONS,
        *POSITION_MUTATIONS,
        *STEP_MUTATIONS,
        *FAMILY_MUTATIONS,
        *FILE_MUTATIONS,
        *QUANTIZED_MUTATIONS,
    ]
