"""The network that a prefix comes out of, with the reference's parameter names and layouts."""

from __future__ import annotations

import paddle
from paddle import nn

from peft_deploy.config import PrefixConfig


def build_encoder(config: PrefixConfig, head_dim: int) -> nn.Sequential:
    """A fresh encoder.

    Args:
        config: with all sizes and the element type.
        head_dim: D.

    Returns:
        ``0``: an embedding [P, 2·L·K·D], ``1``: dropout; or, with a projection, ``0``: an embedding
        [P, K·D], ``1``: a linear layer [K·D, hidden], ``2``: tanh, ``3``: a linear layer
        [hidden, 2·L·K·D], ``4``: dropout.
    """
    per_layer = (config.num_kv_heads or 0) * head_dim
    everything = per_layer * 2 * (config.num_hidden_layers or 0)
    default = paddle.get_default_dtype()
    paddle.set_default_dtype(config.dtype or default)
    try:
        dropout = nn.Dropout(p=config.prefix_dropout)
        if not config.prefix_projection:
            return nn.Sequential(nn.Embedding(config.num_prefix_tokens, everything), dropout)
        return nn.Sequential(
            nn.Embedding(config.num_prefix_tokens, per_layer),
            nn.Linear(per_layer, config.prefix_projection_hidden_size),
            nn.Tanh(),
            nn.Linear(config.prefix_projection_hidden_size, everything),
            dropout,
        )
    finally:
        paddle.set_default_dtype(default)


def past_split(config: PrefixConfig, head_dim: int) -> list[int]:
    """What one row of a batch is divided into: [P, 2·L, K, D]."""
    sizes = (config.num_prefix_tokens, 2 * (config.num_hidden_layers or 0), config.num_kv_heads)
    return [*(size or 0 for size in sizes), head_dim]
