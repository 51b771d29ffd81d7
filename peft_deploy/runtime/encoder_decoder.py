"""Two graphs run as one model: an encoder that reads a source text, and a decoder that writes behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from peft_deploy.errors import ConfigError, ExecutionError, listed
from peft_deploy.runtime.caching import Cache, caching
from peft_deploy.runtime.feeds import check_feeds, check_indices
from peft_deploy.runtime.runner import Array, Runner
from peft_deploy.signature import (
    ATTENTION_MASK,
    ENCODER_ATTENTION_MASK,
    ENCODER_INPUT_IDS,
    INPUT_IDS,
    GraphSignature,
    decoder_alone,
    joint_signature,
)

Integers = npt.NDArray[np.int64]


class EncoderDecoderRunner:
    """A :class:`~peft_deploy.runtime.runner.Runner` of both graphs; generation needs :meth:`reading` first.

    Args:
        encoder: runs the graph that reads.
        decoder: runs the graph that writes.
        start_token_id: the token that every text begins with.
    """

    def __init__(self, encoder: Runner, decoder: Runner, start_token_id: int) -> None:
        self.encoder = encoder
        self.decoder = decoder
        self.start_token_id = start_token_id
        self._signature = joint_signature(encoder.signature, decoder.signature)

    @property
    def signature(self) -> GraphSignature:
        """Inputs and outputs of the two as one."""
        return self._signature

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """The named outputs (all when None), for a full set of inputs; the source is read anew in every call.

        Raises:
            ExecutionError: the inputs do not fit the signature, there is no such output, or a runtime failed.
        """
        check_feeds(self._signature, feeds)
        known = encode(self.encoder, feeds[ENCODER_INPUT_IDS], feeds[ENCODER_ATTENTION_MASK])
        known |= feeds
        names = self.decoder.signature.input_names
        return self.decoder.run({name: known[name] for name in names}, outputs)

    def reading(self, source_ids: Integers, source_mask: Integers) -> SourceRunner:
        """The decoder with these source texts before its eyes.

        Args:
            source_ids: [B, source], padded on either side.
            source_mask: [B, source], 1 = a token.

        Raises:
            ExecutionError: a token that the model does not have.
            ConfigError: the two do not have the same shape, or a row has no token.
        """
        if source_ids.shape != source_mask.shape or not source_mask.any(axis=-1).all():
            raise ConfigError(
                f"source texts of shape {list(source_ids.shape)} came with a mask of shape {list(source_mask.shape)}; "
                "they must be the same, and every row must have a token"
            )
        check_indices(self._signature, {ENCODER_INPUT_IDS: source_ids})
        return SourceRunner(self.encoder, self.decoder, source_ids, source_mask)


class SourceRunner:
    """A decoder that keeps its cache, as :class:`~peft_deploy.runtime.caching.CachingRunner` has it.

    The source is read when the first cache is asked for, once for all steps.

    Args:
        encoder: reads.
        decoder: writes.
        source_ids: [B, source].
        source_mask: [B, source].
    """

    def __init__(
        self, encoder: Runner, decoder: Runner, source_ids: Integers, source_mask: Integers
    ) -> None:
        self._encoder = encoder
        self._decoder = caching(decoder)
        self._ids, self._mask = source_ids, source_mask
        self._source: dict[str, Array] = {}
        self._signature = decoder_alone(decoder.signature)

    @property
    def signature(self) -> GraphSignature:
        """The decoder's, without what follows from the source."""
        return self._signature

    def load_cache(self, arrays: Sequence[Array]) -> Cache:
        """A cache with these contents, in signature order.

        Raises:
            ExecutionError: the encoder failed, or the cache has not one row for each source text.
        """
        if len(arrays[0]) != len(self._ids):
            raise ExecutionError(
                f"{len(arrays[0])} rows are to be written behind {len(self._ids)} source texts"
            )
        if not self._source:
            self._source = encode(self._encoder, self._ids, self._mask)
        return self._decoder.load_cache(arrays)

    def step(self, feeds: Mapping[str, Array], cache: Cache) -> tuple[Array, Cache]:
        """Logits [B, S, V] of the new tokens, and the cache grown by them."""
        return self._decoder.step({**feeds, **self._source}, cache)


def encode(encoder: Runner, ids: Array, mask: Array) -> dict[str, Array]:
    """What a decoder takes of source texts: their mask, and keys and values for each of its layers.

    Args:
        encoder: reads them.
        ids: [B, source].
        mask: [B, source], 1 = a token.

    Raises:
        ExecutionError: it asks for more than tokens and their mask, or does not run.
    """
    feeds = {INPUT_IDS: ids, ATTENTION_MASK: mask}
    if odd := set(encoder.signature.input_names) ^ set(feeds):
        raise ExecutionError(f"these inputs of the encoder are not known:\n{listed(odd)}")
    return {ENCODER_ATTENTION_MASK: mask, **encoder.run(feeds)}
