"""What is active beside a bundle's graph while it is searched: an adapter in its slots, or a prefix as its past."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from peft_deploy.bundle.prefixes import Prefix
from peft_deploy.parity.prefixed import behind_prefix
from peft_deploy.runtime.runner import Array


@dataclass(frozen=True, eq=False)
class Activation:
    """Files of a bundle, as its runner uses them.

    Args:
        slots: slot → its value, for an adapter that fills slots.
        prefix: stands before every row as past.
        wanted: slot, or cache input → what an export would write now.
    """

    slots: Mapping[str, Array] = field(default_factory=dict)
    prefix: Prefix | None = None
    wanted: Mapping[str, Array] = field(default_factory=dict)

    @property
    def given(self) -> Mapping[str, Array]:
        """What the files hold, under the names of ``wanted``."""
        return self.slots if self.prefix is None else self.prefix.past

    @property
    def hidden(self) -> int:
        """Leading tokens of the grown cache that nobody outside knows of."""
        return 0 if self.prefix is None else self.prefix.num_tokens

    def feeds(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Inputs of a graph without anything active → those that it gets."""
        changed = feeds if self.prefix is None else behind_prefix(feeds, self.prefix)
        return {**changed, **self.slots}

    def without_hidden(self, cache: Array) -> Array:
        """A grown cache [B, K, T, D] as it looks from outside."""
        return np.ascontiguousarray(cache[:, :, self.hidden :])

    def with_hidden(self, cache: Array) -> Array:
        """The reverse, zeros in front."""
        wide = [(0, 0)] * cache.ndim
        wide[2] = (self.hidden, 0)
        return np.pad(cache, wide)
