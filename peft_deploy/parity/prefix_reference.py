"""A model behind a trained prefix, in the dynamic graph, as a reference. Needs Paddle.

The prefix comes out of the encoder that was trained, in a ``PrefixModelForCausalLM``; nothing of what an export
makes of it is used here.
"""

from __future__ import annotations

from peft_deploy.environment import require_paddle

require_paddle("the reference side of a parity check")

import copy
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import paddle

from peft_deploy.adapters.prefix import PrefixModelForCausalLM
from peft_deploy.bundle.prefixes import Prefix
from peft_deploy.errors import ParityError
from peft_deploy.families import Family
from peft_deploy.parity.prefixed import PrefixedRunner
from peft_deploy.parity.reference import PaddleReference, RoundedReference, undisturbed
from peft_deploy.runtime import initial_cache
from peft_deploy.runtime.runner import Array, Runner
from peft_deploy.signature import ATTENTION_MASK, INPUT_IDS, LOGITS, POSITION_IDS, past_names

_PROBE = 5  # tokens on which the two ways to run the model are compared
_AGREES = 1e-3  # of the largest logit


class PrefixReference(PaddleReference):
    """A ``PrefixModelForCausalLM``; masks and caches are without the prefix, as in :class:`PrefixedRunner`.

    Args:
        model: with its prefix; its own model may have LoRA layers.
        family: of the model.
        config: its config.json.
        dtype: of its parameters.
        position_offset: what the prefix moves positions by, as the bundle has it.
    """

    def __init__(
        self,
        model: PrefixModelForCausalLM,
        family: Family,
        config: Mapping[str, Any],
        dtype: str = "float32",
        *,
        position_offset: int = 0,
    ) -> None:
        super().__init__(model.model, family, config, dtype)
        self.prefix_model = model
        self._offset = position_offset
        with undisturbed(model):
            rows = [tensor.numpy() for pair in model.prefix_past() for tensor in pair]
        past = dict(zip(past_names(len(rows) // 2), rows, strict=True))
        base = PaddleReference(model.model, family, config, dtype)
        self._prefix = Prefix("reference", past, position_offset)
        self._behind = PrefixedRunner(base, self._prefix)

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """See :meth:`PaddleReference.run`."""
        return self._behind.run(feeds, outputs)

    def exact(self) -> PrefixReference | None:
        """See :meth:`PaddleReference.exact`."""
        if not self._fits_exactly():
            return None
        twin = copy.deepcopy(self.prefix_model)
        twin._to_impl(dtype="float64", floating_only=True)
        return PrefixReference(
            twin, self.family, self.config, "float64", position_offset=self._offset
        )

    def rounded(self, dtype: str, peaks: MutableMapping[str, float]) -> Runner:
        """See :meth:`PaddleReference.rounded`; the prefix is part of the cache, which is rounded, too."""
        base = PaddleReference(self.model, self.family, self.config, self.dtype)
        rounded = RoundedReference(base, self.model, dtype, peaks)
        return PrefixedRunner(rounded, self._prefix)

    def without_adapters(self) -> PaddleReference:
        """The same model without the prefix."""
        return PaddleReference(self.model, self.family, self.config, self.dtype)

    def check_forward(self, *, own_positions: bool) -> None:
        """Passes when the prefix model's own forward gives what :meth:`run` gives.

        Args:
            own_positions: let the model count positions as it does when none are given.

        Raises:
            ParityError: it gives something else; with ``own_positions``, the bundle's rule for positions may not
                be the model's.
        """
        ids = np.arange(1, _PROBE + 1, dtype=np.int64)[None]  # [1, S]
        places = np.arange(_PROBE, dtype=np.int64)[None]
        feeds = {INPUT_IDS: ids, ATTENTION_MASK: np.ones_like(ids), POSITION_IDS: places}
        given = dict(feeds, **{POSITION_IDS: places + self._offset})
        if own_positions or POSITION_IDS not in self.signature.input_names:
            del given[POSITION_IDS]
        with undisturbed(self.prefix_model):
            own = self.prefix_model(**{n: paddle.to_tensor(array) for n, array in given.items()})
        own = own[0] if isinstance(own, (tuple, list)) else own
        logits = self.run(self._complete(feeds))[LOGITS]
        gap, scale = float(np.abs(own.numpy() - logits).max()), float(np.abs(logits).max())
        if gap > _AGREES * scale:
            raise ParityError(
                f"{type(self.model).__name__} behind the prefix, positions moved by {self._offset}, does not give "
                f"what its own forward gives: logits differ by {gap:.3g}, where they reach {scale:.3g}"
            )

    def _complete(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """With an empty cache, and only what the graph takes."""
        wanted = self.signature.input_names
        cache = initial_cache(self.signature, 1)
        empty = {s.name: array for s, array in zip(self.signature.past, cache, strict=True)}
        return {name: array for name, array in {**feeds, **empty}.items() if name in wanted}
