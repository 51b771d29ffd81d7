"""Layers that convert wrongly; in a file, because Paddle reads the source of what it traces."""

from __future__ import annotations

from typing import Any

import paddle
from paddle import nn


class TanhGelu(nn.Layer):
    def forward(self, x: Any) -> Any:
        return nn.functional.gelu(x, approximate=True)


class ErfGelu(nn.Layer):
    def forward(self, x: Any) -> Any:
        return nn.functional.gelu(x)


class RepeatInterleave(nn.Layer):
    def forward(self, x: Any) -> Any:
        return paddle.repeat_interleave(x, 2, axis=1)
