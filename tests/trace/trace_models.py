"""A decoder in three lines that uses an operator which does not convert."""

from __future__ import annotations

from typing import Any

import paddle
from paddle import nn

from peft_deploy.families.standins import ScopeTrace
from peft_deploy.signature import causal_lm_signature
from peft_deploy.trace.program import TracedProgram, trace_model


class UsesSwiglu(nn.Layer):
    """A stand-in whose only layer is ``swiglu``."""

    def __init__(self) -> None:
        super().__init__()
        self.scopes = ScopeTrace()
        self.embedding = self.create_parameter([11, 8])

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, past: Any) -> Any:
        return self._run(input_ids, attention_mask, position_ids, past)

    @paddle.jit.not_to_static
    def _run(self, input_ids: Any, attention_mask: Any, position_ids: Any, past: Any) -> Any:
        kept = (attention_mask.sum() + position_ids.sum()).cast("float32")
        x = nn.functional.embedding(input_ids, self.embedding)
        with self.scopes("block", "0"), self.scopes("mlp"):
            x = nn.functional.swiglu(x)
        return [x * kept, *(paddle.concat([p, p], 2) for p in past)]


class OneLayer:
    """The family that it belongs to."""

    def stand_in(self, model: nn.Layer) -> nn.Layer:
        return model


def trace(model: nn.Layer) -> TracedProgram:
    signature = causal_lm_signature(num_layers=1, num_kv_heads=2, head_dim=4, vocab_size=4)
    return trace_model(model, OneLayer(), signature)  # type: ignore[arg-type]
