"""What a model family has to say about itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from peft_deploy.signature import GraphSignature, causal_lm_signature

if TYPE_CHECKING:
    from paddle import nn

    from peft_deploy.families.names import NameMap
    from peft_deploy.families.parallel import ParallelRule


@dataclass(frozen=True)
class DecoderDims:
    """The sizes that decide a decoder's signature."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int


class DecoderFamily(ABC):
    """A family of decoder-only models: data about it, and how it is written as a graph that traces cleanly.

    Everything but :meth:`stand_in` works without Paddle.

    Attributes:
        model_type: ``model_type`` of config.json, also onnxruntime-genai's name of the family.
        architectures: class names that config.json may carry in ``architectures``.
        name_map: Hugging Face tensor names ↔ PaddleNLP parameter names.
        past_layout: axes of one layer's cache tensor in PaddleNLP: a permutation of ``"BSKD"``
            (batch, sequence, kv heads, head dim). The bundle's layout is always ``"BKSD"``.
        tied: PaddleNLP parameter → the parameter whose storage it shares when the config ties them.
        lora_targets: regular expressions for the linear layers that LoRA adapts by default.
        parallel_rules: how PaddleNLP spreads the layers over tensor-parallel ranks; empty when that is not known.
        paddle_config: PaddleNLP's configuration class, by name in ``paddlenlp.transformers``.
        paddle_model: PaddleNLP's model class, by name in ``paddlenlp.transformers``.
    """

    model_type: ClassVar[str]
    architectures: ClassVar[tuple[str, ...]]
    name_map: ClassVar[NameMap]
    past_layout: ClassVar[str]
    tied: ClassVar[Mapping[str, str]]
    lora_targets: ClassVar[tuple[str, ...]]
    parallel_rules: ClassVar[tuple[ParallelRule, ...]] = ()
    paddle_config: ClassVar[str]
    paddle_model: ClassVar[str]

    @abstractmethod
    def paddle_arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments for PaddleNLP's configuration class, from either kind of config.json.

        Raises:
            UnsupportedModelError: the configuration asks for something that PaddleNLP would silently ignore,
                or that the stand-in does not compute.
        """

    @abstractmethod
    def dims(self, config: Mapping[str, Any]) -> DecoderDims:
        """The sizes, from config.json."""

    @abstractmethod
    def huggingface_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config.json that Hugging Face's ``AutoConfig`` reads, for the bundle."""

    @abstractmethod
    def stand_in(self, model: nn.Layer) -> nn.Layer:
        """The model with the same parameters, written so that it traces cleanly.

        Returns:
            A layer whose ``forward(input_ids, attention_mask, position_ids, past)`` takes and returns what
            :meth:`signature` says, ``past`` and the result being flat lists in signature order; its attribute
            ``scopes`` is a :class:`~peft_deploy.families.standins.ScopeTrace` of that forward.
        """

    def signature(self, config: Mapping[str, Any], dtype: str = "float32") -> GraphSignature:
        """Inputs and outputs of the exported graph."""
        dims = self.dims(config)
        return causal_lm_signature(
            num_layers=dims.num_layers,
            num_kv_heads=dims.num_kv_heads,
            head_dim=dims.head_dim,
            vocab_size=dims.vocab_size,
            dtype=dtype,
        )
