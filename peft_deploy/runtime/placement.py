"""Which provider onnxruntime gave every node of a graph to.

A provider that lacks an operator leaves it to the CPU without a word. On a GPU that costs copies, and a check that
means to cover the GPU's kernels would cover others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peft_deploy.errors import ExecutionError

if TYPE_CHECKING:
    import onnxruntime as ort

RECORD = "session.record_ep_graph_assignment_info"  # a session has to be told before it is made
_NAMED = 5  # nodes of each operator


@dataclass(frozen=True)
class Node:
    """A node of the graph that onnxruntime runs, its own fusions included.

    Args:
        name: of the node.
        operator: its type.
        provider: onnxruntime's name of what runs it.
    """

    name: str
    operator: str
    provider: str


@dataclass(frozen=True)
class Placement:
    """Where the nodes of a graph run.

    Args:
        wanted: onnxruntime's name of the provider that was asked for.
        nodes: all of the graph's.
    """

    wanted: str
    nodes: tuple[Node, ...]

    @classmethod
    def of(cls, session: ort.InferenceSession, wanted: str) -> Placement:
        """What a session says of itself.

        Args:
            session: made with :data:`RECORD` set to ``"1"``.
            wanted: onnxruntime's name of the provider that was asked for.
        """
        nodes = tuple(
            Node(node.name, node.op_type, part.ep_name)
            for part in session.get_provider_graph_assignment_info()
            for node in part.get_nodes()
        )
        return cls(wanted, nodes)

    @property
    def elsewhere(self) -> tuple[Node, ...]:
        """Nodes that another provider runs."""
        return tuple(node for node in self.nodes if node.provider != self.wanted)

    def require_any(self) -> None:
        """Passes when the provider runs anything at all.

        Raises:
            ExecutionError: it does not.
        """
        if len(self.elsewhere) == len(self.nodes):
            raise ExecutionError(
                f"{self.wanted} runs none of the graph's {len(self.nodes)} nodes",
                hint="see that this onnxruntime-gpu is made for the CUDA version that is installed",
            )

    def __str__(self) -> str:
        """How many nodes run where, and which of them not where they should."""
        here = len(self.nodes) - len(self.elsewhere)
        first = f"{here} of {len(self.nodes)} nodes run on {self.wanted}"
        if not self.elsewhere:
            return first
        return f"{first}; the others: {'; '.join(_by_operator(self.elsewhere))}"


def _by_operator(nodes: Iterable[Node]) -> list[str]:
    kinds: dict[tuple[str, str], list[str]] = {}
    for node in nodes:
        kinds.setdefault((node.provider, node.operator), []).append(node.name)
    order = Counter({kind: len(names) for kind, names in kinds.items()}).most_common()
    return [
        f"{count} {operator} on {provider} ({_some(kinds[provider, operator])})"
        for (provider, operator), count in order
    ]


def _some(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
