"""What a model is called with behind a prefix: which inputs can be taken, and how they change."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import paddle
from paddle import nn

from peft_deploy.adapters.prefix.errors import PrefixInputError, UnsupportedPrefixModelError
from peft_deploy.adapters.prefix.masks import check_keep_mask, widen_mask
from peft_deploy.adapters.prefix.sizes import dims_of, rule_of
from peft_deploy.families import PastRule

PadMask = Callable[[Any, int, paddle.Tensor], paddle.Tensor]
# Under which name a model's forward takes a past, PaddleNLP's usual one first.
_PAST_ARGUMENTS = ("past_key_values", "cache")


class PrefixInputs:
    """The inputs of one model behind P prefix tokens.

    Args:
        model: the model; not kept.
        num_tokens: P.

    Attributes:
        model_name: the class of the model, for messages.
        arguments: what its ``forward`` takes.
        past_argument: the one that takes a past.
        num_tokens: P.
        rule: what the model does with a past, if that is known.
        max_positions: how many positions it has; None without a limit, or when not known.

    Raises:
        UnsupportedPrefixModelError: the model's ``forward`` takes no past.
    """

    # No dataclass: Paddle's to_static cannot call the methods of one.
    def __init__(self, model: nn.Layer, num_tokens: int) -> None:
        self.model_name = type(model).__name__
        self.arguments = frozenset(inspect.signature(model.forward).parameters)
        self.num_tokens = num_tokens
        self.rule: PastRule | None = rule_of(model)
        self.max_positions = dims_of(model).max_positions
        past = next((name for name in _PAST_ARGUMENTS if name in self.arguments), None)
        if past is None:
            raise UnsupportedPrefixModelError(
                f"the forward of a {self.model_name} takes neither "
                f"{' nor '.join(_PAST_ARGUMENTS)}, so a prefix cannot be given to it"
            )
        self.past_argument: str = past

    @property
    def counts_from_zero(self) -> bool:
        """Whether positions that are not given start at 0, and may be given."""
        rule = self.rule
        known = rule is not None and rule.takes_positions and not rule.positions_after_past
        return known and "position_ids" in self.arguments

    @property
    def counts_from_past(self) -> bool:
        """Whether positions that are not given start at the length of the past."""
        return self.rule is not None and self.rule.positions_after_past

    @property
    def hands_on_past(self) -> bool:
        """Whether the model's ``prepare_inputs_for_generation`` hands on what generation keeps."""
        return self.rule is None or self.rule.hands_on_past

    def handed_on(self, inputs: dict[str, Any], kept: Mapping[str, Any]) -> Any:
        """The past that generation keeps; the inputs of a step are cut down to what is not in it.

        Args:
            inputs: of the step, over the whole text; changed.
            kept: what generation keeps between its steps.
        """
        past, positions = kept.get(self.past_argument), kept.get("position_ids")
        if not is_empty(past):
            inputs["input_ids"] = inputs["input_ids"][:, -1:]
        if positions is not None:
            inputs["position_ids"] = positions[:, -inputs["input_ids"].shape[1] :]
        return past

    def shape(
        self, input_ids: paddle.Tensor | None, inputs_embeds: paddle.Tensor | None
    ) -> list[int]:
        """[B, S] of the tokens or embeddings.

        Raises:
            PrefixInputError: neither is given, or embeddings to a model that takes none alone.
        """
        if input_ids is not None:
            return _batch_and_length(input_ids)
        if inputs_embeds is None:
            raise PrefixInputError("input_ids or inputs_embeds must be provided")
        takes = "inputs_embeds" in self.arguments
        if not takes or (self.rule is not None and not self.rule.takes_embeddings):
            raise PrefixInputError(f"a {self.model_name} takes no inputs_embeds without input_ids")
        return _batch_and_length(inputs_embeds)

    def check_lengths(self, past: Any, new: int, mask: paddle.Tensor | None) -> None:
        """Checks that past, new tokens, mask and positions fit one another.

        Args:
            past: the model's, with the prefix in it; None when it will be the prefix alone.
            new: S.
            mask: of all tokens, without the prefix's columns.

        Raises:
            PrefixInputError: they do not.
        """
        if not paddle.in_dynamic_mode():  # lengths are symbols there
            return
        P, seen = self.num_tokens, self._length(past)
        if seen is None:
            return
        if seen < P:
            raise PrefixInputError(
                f"the past that is given holds {seen} positions, fewer than the prefix's {P}; "
                "it has to be one that this model returned"
            )
        tokens = seen - P + new
        if self.max_positions is not None and P + tokens > self.max_positions:
            raise PrefixInputError(
                f"{P} prefix tokens and {tokens} tokens make {P + tokens}; "
                f"the model has {self.max_positions} positions",
                hint="use a shorter text, or a prefix of fewer tokens",
            )
        if mask is not None and mask.shape[-1] != tokens:
            raise PrefixInputError(
                f"attention_mask has the shape {list(mask.shape)} for {tokens} tokens; "
                "the prefix is not to be counted, its columns are added here"
            )

    def widened(self, mask: paddle.Tensor, shape: list[int], pad: PadMask | None) -> paddle.Tensor:
        """The mask with the prefix's columns.

        Args:
            mask: [B, T], [B, S, T] or [B, 1, S, T].
            shape: [B, S].
            pad: does it in place of ones in front.

        Raises:
            PrefixInputError: no keep-mask, or ``pad`` made a mask of another length.
        """
        P = self.num_tokens
        if pad is None:
            check_keep_mask(mask)
            return widen_mask(self._taken(mask), P)
        wide = pad(shape, P, mask)
        if wide.shape[-1] != mask.shape[-1] + P:
            raise PrefixInputError(
                f"pad_attention_mask made a mask of {list(wide.shape)} from one of "
                f"{list(mask.shape)}; it has to add {P} columns for the prefix"
            )
        return wide

    def _taken(self, mask: paddle.Tensor) -> paddle.Tensor:
        """The mask with as many dimensions as the model takes."""
        if mask.ndim == 2 or self.rule is None:
            return mask
        if not self.rule.takes_4d_masks:
            raise PrefixInputError(
                f"attention_mask has the shape {list(mask.shape)}; a {self.model_name} only takes "
                "masks [B, T] and counts positions in them"
            )
        return mask.unsqueeze(1) if mask.ndim == 3 and not self.rule.takes_3d_masks else mask

    def _length(self, past: Any) -> int | None:
        if past is None:
            return self.num_tokens
        if self.rule is None:
            return None
        return int(past[0][0].shape[self.rule.layout.index("S")])


def _batch_and_length(tokens: paddle.Tensor) -> list[int]:
    """[B, S]; tensors while a static graph is built, where the sizes are not known."""
    sizes = tokens.shape if paddle.in_dynamic_mode() else paddle.shape(tokens)
    return [sizes[0], sizes[1]]


def is_empty(past: Any) -> bool:
    """Whether there is no past, in one of the ways in which PaddleNLP's models say so."""
    return past is None or len(past) == 0 or past[0] is None
