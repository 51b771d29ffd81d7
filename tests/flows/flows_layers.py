"""Layers that no family knows, alone and with LoRA far from zero."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
from paddle import nn

from peft_deploy.adapters.lora import LoRAModel
from peft_deploy.config import LoRAConfig

SIGNATURE: dict[str, Any] = {
    "inputs": [
        {"name": "ids", "dtype": "int64", "dims": ["batch", "sequence"], "range": [0, 31]},
        {"name": "mask", "dtype": "bool", "dims": ["batch", "sequence"]},
        {"name": "weight", "dtype": "float32", "dims": ["batch", 1, 1], "range": [0.5, 2]},
    ],
    "outputs": ["logits", "ids_again", "hidden", "best"],
}


class Net(nn.Layer):
    """An embedding, a convolution, running statistics, buffers, and a linear layer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.conv = nn.Embedding(31, 12), nn.Conv2D(1, 4, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2D(4), nn.Linear(12, 7)
        self.unused, self.dropout = nn.Linear(3, 3), nn.Dropout(0.5)
        order = np.random.default_rng(5).permutation(31)
        self.register_buffer("order", paddle.to_tensor(order), persistable=False)

    def forward(self, ids: Any, weight: Any, mask: Any = None, extra: Any = None) -> Any:
        flat = paddle.gather(self.order, ids.reshape([-1])).reshape(paddle.shape(ids))
        x = self.embedding(flat).unsqueeze(1)  # [B, 1, S, 12]
        x = self.norm(self.conv(x)).mean(1) * weight
        if mask is not None:
            x = x * mask.unsqueeze(-1).astype("float32")
        logits = self.head(self.dropout(x))
        return {
            "hidden": x,
            "logits": logits,
            "nothing": extra,
            "ids_again": ids,
            "best": logits.argmax(-1),
        }


def make_net(seed: int = 0) -> Net:
    """With running statistics that are not those of a new layer."""
    paddle.seed(seed)
    net = Net()
    rng = np.random.default_rng(seed)
    net.norm._mean.set_value(rng.normal(0, 0.3, 4).astype(np.float32))
    net.norm._variance.set_value(rng.uniform(0.5, 2, 4).astype(np.float32))
    return net


def with_lora(layer: nn.Layer, targets: list[str], seed: int = 3) -> LoRAModel:
    model = LoRAModel(layer, LoRAConfig(r=3, lora_alpha=6, target_modules=targets))
    rng = np.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.set_value(rng.normal(0, 0.4, parameter.shape).astype(np.float32))
    return model
