"""A runner whose every text begins after a prefix, so that all cases of a matrix can be run behind one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from peft_deploy.bundle.prefixes import Prefix
from peft_deploy.runtime.runner import Array, Runner
from peft_deploy.signature import (
    ATTENTION_MASK,
    INPUT_IDS,
    POSITION_IDS,
    GraphSignature,
    present_names,
)


class PrefixedRunner:
    """Gives a runner the prefix as past, as every runtime can.

    From outside there is no prefix: masks and caches are without it.

    Args:
        runner: computes the outputs.
        prefix: stands before every row.
    """

    def __init__(self, runner: Runner, prefix: Prefix) -> None:
        self._runner = runner
        self._prefix = prefix
        self._presents = set(present_names(runner.signature.num_layers))

    @property
    def signature(self) -> GraphSignature:
        """The runner's."""
        return self._runner.signature

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """The named outputs (all when None), the grown cache without the prefix."""
        P = self._prefix.num_tokens
        results = self._runner.run(behind_prefix(feeds, self._prefix), outputs)
        return {
            name: np.ascontiguousarray(array[:, :, P:]) if name in self._presents else array
            for name, array in results.items()
        }


def behind_prefix(feeds: Mapping[str, Array], prefix: Prefix) -> dict[str, Array]:
    """The inputs that give texts behind a prefix what these inputs give them without one.

    Args:
        feeds: every input of a decoder's graph.
        prefix: stands before every row.
    """
    B = feeds[INPUT_IDS].shape[0]
    mask = feeds[ATTENTION_MASK]
    ones = np.ones((B, prefix.num_tokens), mask.dtype)
    changed: dict[str, Array] = {ATTENTION_MASK: np.concatenate([ones, mask], axis=1)}
    if POSITION_IDS in feeds:
        changed[POSITION_IDS] = np.add(feeds[POSITION_IDS], prefix.position_offset, dtype=np.int64)
    for name, rows in prefix.past.items():
        wide = np.broadcast_to(rows, (B, *rows.shape[1:]))
        changed[name] = np.concatenate([wide, feeds[name]], axis=2)
    return {**feeds, **changed}
