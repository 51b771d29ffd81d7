"""Every kind of LoRA layer in every type with every scaling rule: merged, unmerged and a float64
oracle agree, and merging can be undone to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from adapters_tiny import fill_branches
from paddle import nn
from paddle.distributed import fleet
from paddle.distributed.fleet.meta_parallel import ColumnParallelLinear, RowParallelLinear

from peft_deploy.adapters.arrays import to_array
from peft_deploy.adapters.lora import (
    ColumnParallelLoRALinear,
    ColumnParallelLoRAMergedLinear,
    LoRAConfig,
    LoRAConv2D,
    LoRAEmbedding,
    LoRALayer,
    LoRALinear,
    LoRAMergedLinear,
    LoRAModel,
    RowParallelLoRALinear,
)

R, ALPHA = 3, 5
IN, HEADS, PARTS, HEAD_DIM = 10, 2, 3, 2
OUT = HEADS * PARTS * HEAD_DIM
ENABLED = [True, False, True]
RULES: dict[str, tuple[dict[str, object], float]] = {
    "plain": ({}, ALPHA / R),
    "rslora": ({"rslora": True}, ALPHA / math.sqrt(R)),
    "pissa": ({"pissa": True}, 1.0),
    "lora+": ({"lora_plus_scale": 16.0}, ALPHA / R),
}
UNIT_ROUNDOFF = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
}
FORWARD_TOLERANCE = {"float64": 1e-12, "float32": 2e-5}

Array = np.ndarray


@dataclass
class Kind:
    """One class of layers.

    Args:
        layer: the class that LoRAModel has to put in.
        make: the layer that it takes the place of.
        product: A and B in float64 → their product in the shape of the weight.
        apply: input, weight and bias in float64 → the layer's output.
        inputs: an input in a type.
        rules: the scaling rules that it has.
        options: of the configuration.
    """

    layer: type[LoRALayer]
    make: Callable[[], nn.Layer]
    product: Callable[[Array, Array], Array]
    apply: Callable[[Array, Array, Array | float], Array]
    inputs: Callable[[str], paddle.Tensor]
    rules: tuple[str, ...]
    options: dict[str, object] = field(default_factory=dict)


def rows(dtype: str) -> paddle.Tensor:
    return paddle.randn([4, IN], "float32").astype(dtype)


def images(dtype: str) -> paddle.Tensor:
    return paddle.randn([2, 4, 7, 6], "float32").astype(dtype)


def numbers(_dtype: str) -> paddle.Tensor:
    return paddle.to_tensor([[0, 3, 9], [9, 1, 1]])


def product(A: Array, B: Array) -> Array:
    return A @ B


def fused_product(A: Array, B: Array) -> Array:
    """Head by head, part by part: the definition of a partly adapted fused projection."""
    delta = np.zeros((IN, HEADS, PARTS, HEAD_DIM))
    by_head = B.reshape(R, HEADS, sum(ENABLED), HEAD_DIM)
    for k, part in enumerate(np.flatnonzero(ENABLED)):
        for head in range(HEADS):
            delta[:, head, part] = A[:, k * R : (k + 1) * R] @ by_head[:, head, k]
    return delta.reshape(IN, OUT)


def convolution_product(A: Array, B: Array) -> Array:
    return np.einsum("orxy,rikl->oikl", B, A)


def linear(x: Array, W: Array, b: Array | float) -> Array:
    return x @ W + b


def convolution(x: Array, W: Array, b: Array | float) -> Array:
    """Stride 1, padding 1, dilation 2, two groups; the sum over the window, written out."""
    out, per_group, height, width = W.shape
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    rows_out, columns_out = padded.shape[2] - 2 * (height - 1), padded.shape[3] - 2 * (width - 1)
    result = np.zeros((len(x), out, rows_out, columns_out))
    for o in range(out):
        first = per_group * (o // (out // 2))
        for k in range(height):
            for m in range(width):
                window = padded[:, first : first + per_group, 2 * k :, 2 * m :]
                window = window[:, :, :rows_out, :columns_out]
                result[:, o] += np.einsum("bihw,i->bhw", window, W[o, :, k, m])
    return result + np.asarray(b).reshape(-1, 1, 1)


def one_rank() -> SimpleNamespace:
    return SimpleNamespace(nranks=1, rank=0, id=0)


FUSED = {"enable_lora_list": [ENABLED], "head_dim": HEAD_DIM}
KINDS = {
    "linear": Kind(
        LoRALinear,
        lambda: nn.Linear(IN, OUT),
        product,
        linear,
        rows,
        ("plain", "rslora", "pissa", "lora+"),
    ),
    "linear without bias": Kind(
        LoRALinear,
        lambda: nn.Linear(IN, OUT, bias_attr=False),
        product,
        linear,
        rows,
        ("plain", "rslora", "pissa", "lora+"),
    ),
    "fused": Kind(
        LoRAMergedLinear,
        lambda: nn.Linear(IN, OUT),
        fused_product,
        linear,
        rows,
        ("plain", "lora+"),
        FUSED,
    ),
    "convolution": Kind(
        LoRAConv2D,
        lambda: nn.Conv2D(4, 6, 3, padding=1, dilation=2, groups=2),
        convolution_product,
        convolution,
        images,
        ("plain", "lora+"),
    ),
    "embedding": Kind(
        LoRAEmbedding,
        lambda: nn.Embedding(IN, OUT),
        product,
        lambda ids, W, _: W[ids],
        numbers,
        ("plain", "rslora", "lora+"),
    ),
    "column": Kind(
        ColumnParallelLoRALinear,
        lambda: ColumnParallelLinear(IN, OUT, has_bias=True, mp_group=one_rank()),
        product,
        linear,
        rows,
        ("plain", "rslora", "lora+"),
    ),
    "fused column": Kind(
        ColumnParallelLoRAMergedLinear,
        lambda: ColumnParallelLinear(IN, OUT, has_bias=True, mp_group=one_rank()),
        fused_product,
        linear,
        rows,
        ("plain", "lora+"),
        FUSED,
    ),
    "row": Kind(
        RowParallelLoRALinear,
        lambda: RowParallelLinear(IN, OUT, has_bias=True, mp_group=one_rank()),
        product,
        linear,
        rows,
        ("plain", "rslora", "lora+"),
    ),
}
CASES = [(name, rule) for name, kind in KINDS.items() for rule in kind.rules]


@pytest.fixture(autouse=True)
def strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        fleet.fleet, "_user_defined_strategy", fleet.DistributedStrategy(), raising=False
    )


def wrapped(kind: Kind, rule: str, dtype: str) -> tuple[LoRAModel, LoRALayer]:
    """A model of one layer in a type, A and B far from zero."""
    base = nn.Sequential(kind.make())
    config = LoRAConfig(
        r=R, lora_alpha=ALPHA, target_modules=["0"], **kind.options, **RULES[rule][0]
    )
    model = LoRAModel(base, config)
    fill_branches(model, scale=0.6)
    model.to(dtype=dtype)
    model.eval()
    assert type(base[0]) is kind.layer
    return model, base[0]


def wide(tensor: paddle.Tensor) -> Array:
    return to_array(tensor).astype(np.float64)


@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF)
@pytest.mark.parametrize(("name", "rule"), CASES)
def test_merging_rounds_the_float64_result_once(name: str, rule: str, dtype: str) -> None:
    kind, scaling = KINDS[name], RULES[rule][1]
    model, layer = wrapped(kind, rule, dtype)
    before = to_array(layer.weight)
    A, B, W = wide(layer.lora_A), wide(layer.lora_B), wide(layer.weight)
    delta = scaling * kind.product(A, B)
    expected = W + delta
    assert np.abs(delta).max() > 0.5
    model.merge()
    merged = to_array(layer.weight)
    assert merged.dtype == before.dtype == np.dtype(to_array(layer.lora_A).dtype)
    # what float32, or float64, may lose while it adds up R products
    carried = 2.0**-52 if dtype == "float64" else 2.0**-23
    size = np.abs(W) + scaling * kind.product(np.abs(A), np.abs(B))
    limit = UNIT_ROUNDOFF[dtype] * np.abs(expected) + (R + 2) * carried * size
    limit += 2.0**-25 if dtype == "float16" else 0.0  # half the step between its smallest numbers
    assert (np.abs(merged.astype(np.float64) - expected) <= limit).all()
    model.unmerge()
    assert to_array(layer.weight).tobytes() == before.tobytes()


@pytest.mark.parametrize("dtype", FORWARD_TOLERANCE)
@pytest.mark.parametrize(("name", "rule"), CASES)
def test_merged_unmerged_and_oracle_compute_the_same(name: str, rule: str, dtype: str) -> None:
    kind, scaling = KINDS[name], RULES[rule][1]
    model, layer = wrapped(kind, rule, dtype)
    x = kind.inputs(dtype)
    bias = getattr(layer, "bias", None)
    b = 0.0 if bias is None else wide(bias)
    W = wide(layer.weight)
    changed = W + scaling * kind.product(wide(layer.lora_A), wide(layer.lora_B))
    expected = kind.apply(x.numpy(), changed, b)
    assert np.abs(expected - kind.apply(x.numpy(), W, b)).max() > 0.5
    tolerance = FORWARD_TOLERANCE[dtype]
    for act in (lambda: None, model.merge, model.unmerge):
        act()
        output = model(x).numpy()
        assert output.dtype == np.dtype(dtype)
        np.testing.assert_allclose(output, expected, rtol=tolerance, atol=tolerance)
