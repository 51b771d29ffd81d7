"""What a model family has to say about itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from peft_deploy.errors import UnsupportedModelError
from peft_deploy.signature import GraphSignature, causal_lm_signature

if TYPE_CHECKING:
    from paddle import Tensor, nn

    from peft_deploy.families.names import NameMap
    from peft_deploy.families.packing import PackRule
    from peft_deploy.families.parallel import ParallelRule

# Under which names configurations keep the number of layers, the usual one first.
LAYER_KEYS = ("num_hidden_layers", "num_layers", "n_layer")


@dataclass(frozen=True, kw_only=True)
class ModelDims:
    """The sizes that decide a model's signature; in an encoder every head has keys and values of its own."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int


class Family(ABC):
    """A family of models: data about it, and how it is written as a graph that traces cleanly.

    Everything but :meth:`stand_in` and :meth:`run_eagerly` works without Paddle.

    Attributes:
        model_type: ``model_type`` of config.json.
        architectures: class name that config.json may carry in ``architectures`` → PaddleNLP's model class, by
            name in ``paddlenlp.transformers``. The first one is the family's usual one.
        lora_targets: regular expressions for the linear layers that LoRA adapts by default.
        parallel_rules: how PaddleNLP spreads the layers over tensor-parallel ranks; empty when that is not known.
        paddle_config: PaddleNLP's configuration class, by name in ``paddlenlp.transformers``.
        inert: entries of config.json that change nothing that is computed, beyond those of any family
            (:mod:`~peft_deploy.families.unread`), or nothing where the family does not ask for them.
        genai_type: onnxruntime-genai's name of the family; None for models that it does not run. ``"decoder"`` is
            any decoder whose graph has the usual inputs.
    """

    model_type: ClassVar[str]
    architectures: ClassVar[Mapping[str, str]]
    lora_targets: ClassVar[tuple[str, ...]]
    parallel_rules: ClassVar[tuple[ParallelRule, ...]] = ()
    paddle_config: ClassVar[str]
    inert: ClassVar[frozenset[str]] = frozenset()
    genai_type: ClassVar[str | None] = None

    def paddle_model(self, config: Mapping[str, Any]) -> str:
        """PaddleNLP's model class for a config.json, by name in ``paddlenlp.transformers``."""
        named = config.get("architectures") or []
        known = [self.architectures[name] for name in named if name in self.architectures]
        return known[0] if known else next(iter(self.architectures.values()))

    @abstractmethod
    def names(self, config: Mapping[str, Any]) -> NameMap:
        """Hugging Face tensor names ↔ PaddleNLP parameter names, of all parameters of a model with this config.

        An architecture alone has to do: weights without a config.json are recognized by these names.
        """

    def pack_rules(self, config: Mapping[str, Any]) -> tuple[PackRule, ...]:
        """The linear layers that read the same input, and so can be one matrix in a graph."""
        return ()

    def tied(self, config: Mapping[str, Any]) -> Mapping[str, str]:
        """PaddleNLP parameter → the parameter whose storage it shares."""
        return {}

    def unused(self, config: Mapping[str, Any]) -> frozenset[str]:
        """PaddleNLP parameters that no output depends on; a checkpoint may lack them, and no graph has them."""
        return frozenset()

    def pools(self, config: Mapping[str, Any]) -> bool:
        """Whether the model can give one vector a text, pooled from its hidden states."""
        return False

    def configured(self, config: Mapping[str, Any]) -> Family:
        """The family with what else it has to know of a model to run it; itself when that is nothing."""
        return self

    def settle(self, model: nn.Layer) -> None:  # noqa: B027 - most families have nothing of the kind
        """Sets what PaddleNLP sets while it initializes weights and is no weight. Needs Paddle.

        Args:
            model: just built, its weights not initialized.
        """

    def kept_apart(self, config: Mapping[str, Any]) -> Mapping[str, str]:
        """The tied parameters that PaddleNLP's class has storage of its own for, and so looks for in a checkpoint."""
        return {}

    @abstractmethod
    def paddle_arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments for PaddleNLP's configuration class, from either kind of config.json.

        Raises:
            UnsupportedModelError: the configuration asks for something that PaddleNLP would silently ignore,
                or that the stand-in does not compute.
        """

    def remarks(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Where PaddleNLP, and so the bundle, computes something else than transformers from the same config.json."""
        return ()

    @abstractmethod
    def dims(self, config: Mapping[str, Any]) -> ModelDims:
        """The sizes, from config.json."""

    def with_num_layers(self, config: Mapping[str, Any], count: int) -> dict[str, Any]:
        """The configuration of a model that differs in its number of layers only.

        Args:
            config: config.json.
            count: layers of the other model.

        Raises:
            UnsupportedModelError: the configuration does not say how many layers the model has where others do.
        """
        present = [key for key in LAYER_KEYS if config.get(key) is not None]
        changed = {**config, **dict.fromkeys(present or LAYER_KEYS[:1], count)}
        if self.dims(changed).num_layers != count:
            raise UnsupportedModelError(
                f"the number of layers of a {self.model_type} model is not in {', '.join(LAYER_KEYS)}"
            )
        return changed

    def peft_task(self, config: Mapping[str, Any]) -> str | None:
        """What Hugging Face's PEFT calls the task of a model (its ``TaskType``); None where it has no name for it."""
        return None

    def context_length(self, config: Mapping[str, Any]) -> int | None:
        """The most tokens that the model can see, new ones included; None where there is no such limit."""
        return self.dims(config).max_positions

    @abstractmethod
    def huggingface_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config.json that Hugging Face's ``AutoConfig`` reads, for the bundle."""

    @abstractmethod
    def stand_in(self, model: nn.Layer) -> nn.Layer:
        """The model with the same parameters, written so that it traces cleanly.

        Returns:
            A layer whose ``forward`` takes the signature's inputs in order, an encoder's keys and values and the cache
            as one flat list each at the end when there are any, and returns the signature's outputs as one flat list;
            its attribute ``scopes`` is a
            :class:`~peft_deploy.families.standins.ScopeTrace` of that forward.
        """

    @abstractmethod
    def run_eagerly(
        self, model: nn.Layer, feeds: Mapping[str, Tensor], signature: GraphSignature
    ) -> dict[str, Tensor]:
        """PaddleNLP's own forward, called as the signature says: what the stand-in has to equal.

        Args:
            model: the PaddleNLP model, or a LoRA model around it.
            feeds: every input of the signature by name, the cache in the bundle's layout.
            signature: of the graph.

        Returns:
            Every output of the signature by name, the cache in the bundle's layout.
        """

    @abstractmethod
    def signature(self, config: Mapping[str, Any], dtype: str = "float32") -> GraphSignature:
        """Inputs and outputs of the exported graph."""

    def whole_signature(self, config: Mapping[str, Any], dtype: str = "float32") -> GraphSignature:
        """Inputs and outputs of the whole model, of which the exported graph may be a part."""
        return self.signature(config, dtype)


class DecoderFamily(Family):
    """A family of decoder-only language models.

    Attributes:
        past_layout: axes of one layer's cache tensor in PaddleNLP: a permutation of ``"BSKD"``
            (batch, sequence, kv heads, head dim). The bundle's layout is always ``"BKSD"``.
        past_argument: what PaddleNLP's forward calls the cache.
    """

    past_layout: ClassVar[str]
    past_argument: ClassVar[str] = "past_key_values"
    genai_type = "decoder"

    def peft_task(self, config: Mapping[str, Any]) -> str:
        """See :meth:`Family.peft_task`."""
        return "CAUSAL_LM"

    def takes_positions(self, config: Mapping[str, Any]) -> bool:
        """Whether the graph has ``position_ids``: not when positions follow from the mask alone."""
        return True

    def run_eagerly(
        self, model: nn.Layer, feeds: Mapping[str, Tensor], signature: GraphSignature
    ) -> dict[str, Tensor]:
        """See :meth:`Family.run_eagerly`."""
        from peft_deploy.families.eager import run_decoder

        return run_decoder(model, feeds, signature, self.past_layout, self.past_argument)

    def signature(self, config: Mapping[str, Any], dtype: str = "float32") -> GraphSignature:
        """See :meth:`Family.signature`."""
        dims = self.dims(config)
        return causal_lm_signature(
            num_layers=dims.num_layers,
            num_kv_heads=dims.num_kv_heads,
            head_dim=dims.head_dim,
            vocab_size=dims.vocab_size,
            dtype=dtype,
            positions=self.takes_positions(config),
        )
