"""A model behind a trained prefix, in the dynamic graph, as a reference. Needs Paddle.

The prefix comes out of the encoder that was trained, through ``PrefixModelForCausalLM``; nothing of what an export
makes of it is used here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import paddle

from peft_deploy.adapters.prefix import PrefixModelForCausalLM
from peft_deploy.errors import ParityError
from peft_deploy.families import Family
from peft_deploy.parity.reference import PaddleReference, undisturbed
from peft_deploy.runtime import check_feeds, initial_cache
from peft_deploy.runtime.runner import Array
from peft_deploy.signature import (
    ATTENTION_MASK,
    INPUT_IDS,
    POSITION_IDS,
    past_names,
    present_names,
)

_PROBE = 5  # tokens on which the positions are compared
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
        super().__init__(model, family, config, dtype)
        self._offset = position_offset
        self._rows: dict[str, Array] | None = None

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """See :meth:`PaddleReference.run`."""
        check_feeds(self._signature, feeds)
        results = self._compute(self._behind(feeds), self._signature.output_names)
        P = self.model.prefix_config.num_prefix_tokens
        for name in present_names(self._signature.num_layers):
            results[name] = np.ascontiguousarray(results[name][:, :, P:])
        wanted = self._signature.output_names if outputs is None else outputs
        return {name: results[name] for name in wanted}

    def exact(self) -> PrefixReference | None:
        """See :meth:`PaddleReference.exact`."""
        if not self._fits_exactly():
            return None
        twin = copy.deepcopy(self.model)
        for layer in (twin.model, twin.prefix_encoder):
            layer.to(dtype="float64")
        return PrefixReference(
            twin, self.family, self.config, "float64", position_offset=self._offset
        )

    def without_adapters(self) -> PaddleReference:
        """The same model without the prefix."""
        return PaddleReference(self.model.model, self.family, self.config, self.dtype)

    def check_positions(self) -> None:
        """Passes when the model, left to itself, counts positions as the bundle will.

        Raises:
            ParityError: it does not.
        """
        ids = np.arange(1, _PROBE + 1, dtype=np.int64)[None]  # [1, S]
        ones = np.ones_like(ids)
        with undisturbed(self.model):
            own = self.model(
                input_ids=paddle.to_tensor(ids), attention_mask=paddle.to_tensor(ones)
            )
        own = own[0] if isinstance(own, (tuple, list)) else own
        feeds = {INPUT_IDS: ids, ATTENTION_MASK: ones, POSITION_IDS: np.arange(_PROBE)[None]}
        given = self.run(self._complete(feeds))[self._signature.output_names[0]]
        gap = float(np.abs(own.numpy() - given).max())
        scale = float(np.abs(given).max())
        if gap > _AGREES * scale:
            raise ParityError(
                f"{type(self.model.model).__name__} itself does not count positions behind a prefix from "
                f"{self._offset}: its logits then differ by {gap:.3g}, where they reach {scale:.3g}"
            )

    def _behind(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The cache that is given gets the prefix; an empty one is left to the model, which puts it there."""
        changed: dict[str, Array] = {}
        if POSITION_IDS in feeds:
            changed[POSITION_IDS] = np.add(feeds[POSITION_IDS], self._offset, dtype=np.int64)
        for name in past_names(self._signature.num_layers):
            if feeds[name].shape[2]:
                rows = self._prefix_rows()[name]
                wide = np.broadcast_to(rows, (feeds[name].shape[0], *rows.shape[1:]))
                changed[name] = np.concatenate([wide, feeds[name]], axis=2)
        return {**feeds, **changed}

    def _prefix_rows(self) -> dict[str, Array]:
        """Keys and values of the prefix, [1, K, P, D], from the cache that the model returns."""
        if self._rows is None:
            P, L = self.model.prefix_config.num_prefix_tokens, self._signature.num_layers
            ids = np.zeros((1, 1), np.int64)
            feeds = {INPUT_IDS: ids, ATTENTION_MASK: np.ones_like(ids), POSITION_IDS: ids}
            results = self._compute(self._complete(feeds), present_names(L))
            pairs = zip(past_names(L), present_names(L), strict=True)
            self._rows = {past: results[present][:, :, :P] for past, present in pairs}
        return self._rows

    def _complete(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """With an empty cache, and only what the graph takes."""
        wanted = self._signature.input_names
        cache = initial_cache(self._signature, 1)
        empty = {s.name: array for s, array in zip(self._signature.past, cache, strict=True)}
        return {name: array for name, array in {**feeds, **empty}.items() if name in wanted}
