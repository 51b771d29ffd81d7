"""What every stand-in is: the parameters of a model, and a forward that Paddle traces as it is written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import paddle
from paddle import Tensor, nn

from peft_deploy.families.standins.scope import ScopeTrace


class StandIn(nn.Layer, ABC):  # type: ignore[misc]
    """Shares the parameters of the model it stands for.

    A subclass writes ``forward`` with the inputs of its signature, as Paddle reads their number and names there; it
    has nothing to do but to call :meth:`traced`.

    Args:
        model: PaddleNLP's.
    """

    def __init__(self, model: nn.Layer) -> None:
        super().__init__()
        self.model = model
        self.scopes = ScopeTrace()

    # Without this mark Paddle rewrites the source of everything called here, once for every layer.
    @paddle.jit.not_to_static  # type: ignore[untyped-decorator]
    def traced(self, *inputs: Any) -> list[Tensor]:
        """The outputs for the inputs of ``_run``."""
        return self._run(*inputs)

    @abstractmethod
    def _run(self, *inputs: Any) -> list[Tensor]:
        """The outputs of the signature, in order, from its inputs."""


class DecoderStandIn(StandIn):
    """A decoder whose graph has ``position_ids``."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: list[Tensor],
    ) -> list[Tensor]:
        """See ``Family.stand_in``."""
        outputs: list[Tensor] = self.traced(input_ids, attention_mask, position_ids, past)
        return outputs


class AlibiDecoderStandIn(StandIn):
    """A decoder whose positions follow from the mask alone."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past: list[Tensor]
    ) -> list[Tensor]:
        """See ``Family.stand_in``."""
        outputs: list[Tensor] = self.traced(input_ids, attention_mask, past)
        return outputs
