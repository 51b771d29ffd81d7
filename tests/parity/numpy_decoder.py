"""A small Llama-type decoder in numpy with a LoRA adapter: both sides of a check, and its faults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from peft_deploy.signature import (
    ATTENTION_MASK,
    INPUT_IDS,
    LOGITS,
    POSITION_IDS,
    GraphSignature,
    causal_lm_signature,
    past_names,
    present_names,
)

L, E, H, K, D, F, V, R = 3, 32, 4, 2, 8, 48, 61, 4
MAX_POSITIONS = 96
SCALING = 2.0
THETA = 10000.0
LINEARS = {
    "q": (E, H * D),
    "k": (E, K * D),
    "v": (E, K * D),
    "o": (H * D, E),
    "gate": (E, F),
    "up": (E, F),
    "down": (F, E),
}

Weights = dict[str, np.ndarray]


def make_weights(seed: int = 0, strength: float = 1.0) -> tuple[Weights, Weights]:
    """Base weights, and LoRA A and B by linear layer, B far from zero (strength 0 makes it zero)."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float) -> np.ndarray:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    base: Weights = {"embed": normal(V, E, scale=1.0), "norm": 1 + normal(E, scale=0.2)}
    lora: Weights = {}
    for i in range(L):
        base[f"{i}.n1"], base[f"{i}.n2"] = 1 + normal(E, scale=0.2), 1 + normal(E, scale=0.2)
        for name, (rows, columns) in LINEARS.items():
            base[f"{i}.{name}"] = normal(rows, columns, scale=1.5 * rows**-0.5)
            lora[f"{i}.{name}.A"] = normal(rows, R, scale=rows**-0.5)
            lora[f"{i}.{name}.B"] = normal(R, columns, scale=0.25 * strength)
    return base, lora


def merge(base: Weights, lora: Weights, scaling: float = SCALING) -> Weights:
    merged = dict(base)
    for key in base:
        if f"{key}.A" in lora:
            delta = lora[f"{key}.A"].astype(np.float64) @ lora[f"{key}.B"].astype(np.float64)
            merged[key] = (base[key] + scaling * delta).astype(np.float32)
    return merged


@dataclass
class NumpyDecoder:
    """Implements both protocols. The fields after ``dtype`` are faults."""

    base: Weights
    lora: Weights = field(default_factory=dict)
    dtype: str = "float32"
    masked: float = -1e30
    causal_offset: int = 0
    ignore_mask: bool = False
    position_offset: int = 0
    own_positions: bool = False
    theta: float = THETA
    epsilon: float = 1e-6
    swap_presents: bool = False
    swap_key_value: bool = False
    nan_at_padding: bool = False
    forget_past: bool = False
    roll_logits: bool = False
    has_exact: bool = True

    @property
    def signature(self) -> GraphSignature:
        return causal_lm_signature(
            num_layers=L, num_kv_heads=K, head_dim=D, vocab_size=V, dtype=self.dtype
        )

    def exact(self) -> NumpyDecoder | None:
        return replace(self, dtype="float64") if self.has_exact else None

    def without_adapters(self) -> NumpyDecoder | None:
        return replace(self, lora={}) if self.lora else None

    def linear(self, key: str, x: np.ndarray) -> np.ndarray:
        y = x @ self.base[key].astype(self.dtype)
        if f"{key}.A" in self.lora:
            A, B = (self.lora[f"{key}.{m}"].astype(self.dtype) for m in "AB")
            y = y + x.dtype.type(SCALING) * ((x @ A) @ B)
        return y

    def norm(self, key: str, x: np.ndarray) -> np.ndarray:
        root = np.sqrt((x * x).mean(-1, keepdims=True) + x.dtype.type(self.epsilon))
        return x / root * self.base[key].astype(self.dtype)

    def run(
        self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        ids, mask, positions = (feeds[n] for n in (INPUT_IDS, ATTENTION_MASK, POSITION_IDS))
        B, S = ids.shape
        T = mask.shape[1]
        if self.own_positions:
            positions = np.broadcast_to(np.arange(T - S, T), (B, S))
        cos, sin = self.rotary(positions + self.position_offset)
        keep = np.arange(T)[None] <= np.arange(S)[:, None] + T - S + self.causal_offset
        keep = (
            keep[None] & (np.ones_like(mask) if self.ignore_mask else mask).astype(bool)[:, None]
        )
        bias = np.where(keep[:, None, None], 0.0, self.masked).astype(self.dtype)  # [B,1,1,S,T]
        x = self.base["embed"][ids].astype(self.dtype)
        caches: list[np.ndarray] = []
        for i in range(L):
            past = [feeds[name] for name in past_names(L)[2 * i : 2 * i + 2]]
            x, present = self.layer(i, x, cos, sin, bias, past)
            caches += present
        logits = self.norm("norm", x) @ self.base["embed"].T.astype(self.dtype)
        return self.spoil(
            dict(zip([LOGITS, *present_names(L)], [logits, *caches], strict=True)), mask
        )

    def layer(self, i, x, cos, sin, bias, past):  # type: ignore[no-untyped-def]
        B, S, _ = x.shape
        h = self.norm(f"{i}.n1", x)
        q, k, v = (
            self.linear(f"{i}.{n}", h).reshape(B, S, -1, D).transpose(0, 2, 1, 3) for n in "qkv"
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (np.concatenate([p, new], 2) for p, new in zip(past, (k, v), strict=True))
        if self.forget_past and past[0].shape[2]:
            bias = bias.copy()
            bias[..., 0] = self.masked
        grouped = q.reshape(B, K, H // K, S, D)
        scores = grouped @ k[:, :, None].swapaxes(-1, -2) * x.dtype.type(D**-0.5) + bias
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights = weights / weights.sum(-1, keepdims=True)
        out = (weights @ v[:, :, None]).reshape(B, H, S, D).transpose(0, 2, 1, 3)
        x = x + self.linear(f"{i}.o", out.reshape(B, S, H * D))
        h = self.norm(f"{i}.n2", x)
        gate = self.linear(f"{i}.gate", h)
        hidden = gate / (1 + np.exp(-gate)) * self.linear(f"{i}.up", h)
        return x + self.linear(f"{i}.down", hidden), [k, v]

    def rotary(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        frequency = (self.theta ** (-np.arange(0, D, 2) / D)).astype(np.float32)
        angles = positions[:, None, :, None].astype(np.float32) * frequency
        return np.cos(angles).astype(self.dtype), np.sin(angles).astype(self.dtype)

    def spoil(self, outputs: dict[str, np.ndarray], mask: np.ndarray) -> dict[str, np.ndarray]:
        names = present_names(L)
        if self.swap_presents:
            outputs[names[0]], outputs[names[2]] = outputs[names[2]], outputs[names[0]]
        if self.swap_key_value:
            outputs[names[2]], outputs[names[3]] = outputs[names[3]], outputs[names[2]]
        if self.nan_at_padding:
            outputs[names[-1]] = np.where(mask[:, None, :, None] == 0, np.nan, outputs[names[-1]])
        if self.roll_logits:
            outputs[LOGITS] = np.roll(outputs[LOGITS], 1, axis=0)
        return outputs


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    a, b = np.split(x, 2, -1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
