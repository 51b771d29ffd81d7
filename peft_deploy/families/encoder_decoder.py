"""Families of an encoder and a decoder that attends to its text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peft_deploy.families.family import Family
from peft_deploy.signature import GraphSignature, cross_attention_signatures, joint_signature

if TYPE_CHECKING:
    from paddle import nn


class EncoderDecoderFamily(Family):
    """A model that is exported as two graphs: the encoder reads a source text once, the decoder writes.

    :meth:`signature` and :meth:`stand_in` are the decoder's. :meth:`dims` has the decoder's layers.
    """

    def peft_task(self, config: Mapping[str, Any]) -> str:
        """See :meth:`Family.peft_task`."""
        return "SEQ_2_SEQ_LM"

    def signature(self, config: Mapping[str, Any], dtype: str = "float32") -> GraphSignature:
        """See :meth:`Family.signature`; of the decoder's graph."""
        return self._signatures(config, dtype)[1]

    def encoder_signature(
        self, config: Mapping[str, Any], dtype: str = "float32"
    ) -> GraphSignature:
        """Inputs and outputs of the encoder's graph, whose outputs are inputs of the decoder's."""
        return self._signatures(config, dtype)[0]

    def whole_signature(self, config: Mapping[str, Any], dtype: str = "float32") -> GraphSignature:
        """See :meth:`Family.whole_signature`."""
        return joint_signature(*self._signatures(config, dtype))

    def _signatures(
        self, config: Mapping[str, Any], dtype: str
    ) -> tuple[GraphSignature, GraphSignature]:
        dims = self.dims(config)
        return cross_attention_signatures(
            num_layers=dims.num_layers,
            num_heads=dims.num_kv_heads,
            head_dim=dims.head_dim,
            vocab_size=dims.vocab_size,
            dtype=dtype,
        )

    @abstractmethod
    def encoder_stand_in(self, model: nn.Layer) -> nn.Layer:
        """The encoder, and the projections of its text to keys and values; see :meth:`Family.stand_in`."""

    @abstractmethod
    def encoder_uses(self, parameter: str) -> bool:
        """Whether the encoder's graph computes with one of PaddleNLP's parameters."""

    @abstractmethod
    def decoder_uses(self, parameter: str) -> bool:
        """Whether the decoder's graph does."""

    @abstractmethod
    def start_token(self, config: Mapping[str, Any]) -> int:
        """The token that the decoder begins with.

        Args:
            config: config.json, and over it generation_config.json where there is one.
        """
