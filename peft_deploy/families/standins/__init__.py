"""The building blocks of decoders, written so that they trace cleanly; every family's stand-in is made of these.

Rules that hold for all of them: sizes that change from call to call are taken with ``paddle.shape`` or left to
``reshape`` with 0 and -1; no branch depends on a tensor; nothing that Paddle2ONNX refuses or translates wrongly
(``swiglu``, ``rms_norm``, fused rotary, ``is_causal``, int64 arithmetic with Python numbers) is used. So Paddle's
AST rewriting has nothing to do, and the same source pattern gives the same graph pattern in every family.

Shape letters: B batch, S new tokens, T past and new tokens, H heads, K kv heads, G = H/K, D head dim, E hidden.
Needs Paddle.
"""

from peft_deploy.families.standins.attention import (
    alibi_bias,
    alibi_slopes,
    cached_attention,
    causal_bias,
    grouped_attention,
    split_fused_heads,
    split_heads,
)
from peft_deploy.families.standins.layers import (
    gelu_tanh,
    layer_norm,
    linear,
    rms_norm,
    silu_gated,
)
from peft_deploy.families.standins.positions import tokens_up_to
from peft_deploy.families.standins.rotary import NeighbourRotaryTable, RotaryTable
from peft_deploy.families.standins.scope import ScopeTrace
from peft_deploy.families.standins.stand_in import AlibiDecoderStandIn, DecoderStandIn, StandIn

__all__ = [
    "AlibiDecoderStandIn",
    "DecoderStandIn",
    "NeighbourRotaryTable",
    "RotaryTable",
    "ScopeTrace",
    "StandIn",
    "alibi_bias",
    "alibi_slopes",
    "cached_attention",
    "causal_bias",
    "gelu_tanh",
    "grouped_attention",
    "layer_norm",
    "linear",
    "rms_norm",
    "silu_gated",
    "split_fused_heads",
    "split_heads",
    "tokens_up_to",
]
