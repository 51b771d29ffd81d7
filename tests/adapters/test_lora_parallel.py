"""Tensor-parallel layers, with the ranks played one after the other: fleet has no CPU kernels for
them.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from paddle import nn
from paddle.distributed import fleet
from paddle.distributed.fleet.layers.mpu import mp_layers, mp_ops
from paddle.distributed.fleet.meta_parallel import ColumnParallelLinear, RowParallelLinear

from peft_deploy.adapters.lora import (
    ColumnParallelLoRALinear,
    ColumnParallelLoRAMergedLinear,
    LoRAConfig,
    LoRALinear,
    LoRAMergedLinear,
    LoRAModel,
    RowParallelLoRALinear,
    row_parallel,
)

IN, OUT, R, ALPHA = 8, 12, 3, 6
RANKS = 2


@pytest.fixture(autouse=True)
def strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        fleet.fleet, "_user_defined_strategy", fleet.DistributedStrategy(), raising=False
    )
    tracker = SimpleNamespace(rng_state=lambda: nullcontext())
    monkeypatch.setattr(mp_layers, "get_rng_state_tracker", lambda: tracker)
    monkeypatch.setattr(row_parallel, "get_rng_state_tracker", lambda: tracker)


def group(rank: int = 0, ranks: int = RANKS) -> SimpleNamespace:
    return SimpleNamespace(nranks=ranks, rank=rank, id=0)


def full_layer(**options: object) -> LoRALinear:
    layer = LoRALinear(IN, OUT, r=R, lora_alpha=ALPHA, **options)
    for parameter in layer.parameters():
        parameter.set_value(paddle.randn(parameter.shape) * 0.5)
    return layer


def part(array: paddle.Tensor, rank: int, axis: int) -> paddle.Tensor:
    return paddle.split(array, RANKS, axis)[rank]


def column_ranks(full: LoRALinear, **options: object) -> list[ColumnParallelLoRALinear]:
    ranks = []
    for rank in range(RANKS):
        layer = ColumnParallelLoRALinear(
            IN, OUT, R, ALPHA, mp_group=group(rank), has_bias=True, gather_output=False, **options
        )
        layer.weight.set_value(part(full.weight, rank, 1))
        layer.bias.set_value(part(full.bias, rank, 0))
        layer.lora_A.set_value(full.lora_A)
        layer.lora_B.set_value(part(full.lora_B, rank, 1))
        ranks.append(layer)
    return ranks


def row_ranks(full: LoRALinear) -> list[RowParallelLoRALinear]:
    ranks = []
    for rank in range(RANKS):
        layer = RowParallelLoRALinear(
            IN, OUT, R, ALPHA, mp_group=group(rank), has_bias=True, input_is_parallel=True
        )
        layer.weight.set_value(part(full.weight, rank, 0))
        layer.bias.set_value(full.bias)
        layer.lora_A.set_value(part(full.lora_A, rank, 0))
        layer.lora_B.set_value(full.lora_B)
        ranks.append(layer)
    return ranks


def run_columns(ranks: list, x: paddle.Tensor, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    monkeypatch.setattr(mp_ops, "_c_identity", lambda x, **_: x)
    return np.concatenate([layer(x).numpy() for layer in ranks], axis=-1)


def run_rows(ranks: list, x: paddle.Tensor, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Runs rank 0 with every sum over the ranks filled in from the others' contributions."""
    calls: list[list[paddle.Tensor]] = []
    for rank, layer in enumerate(ranks):
        seen: list[paddle.Tensor] = []

        def keep(tensor: paddle.Tensor, seen=seen, **_: object) -> paddle.Tensor:
            seen.append(tensor)
            return tensor

        monkeypatch.setattr(mp_ops, "_mp_allreduce", keep)
        layer(part(x, rank, -1))
        calls.append(seen)
    sums = iter([sum(contributions) for contributions in zip(*calls, strict=True)])
    monkeypatch.setattr(mp_ops, "_mp_allreduce", lambda tensor, **_: next(sums))
    return ranks[0](part(x, 0, -1)).numpy()


@pytest.mark.parametrize("rslora", [False, True])
def test_columns_add_up_to_the_whole_layer(rslora: bool, monkeypatch) -> None:
    full = full_layer(rslora=rslora)
    ranks = column_ranks(full, rslora=rslora)
    x = paddle.randn([2, 5, IN])
    expected = full(x).numpy()
    np.testing.assert_allclose(run_columns(ranks, x, monkeypatch), expected, atol=1e-5)
    full.disable_lora = True
    assert np.abs(full(x).numpy() - expected).max() > 0.5
    full.disable_lora = False
    full.merge()
    before = [layer.weight.numpy() for layer in ranks]
    for rank, layer in enumerate(ranks):
        layer.merge()
        np.testing.assert_allclose(layer.weight.numpy(), part(full.weight, rank, 1), atol=1e-6)
    np.testing.assert_allclose(run_columns(ranks, x, monkeypatch), expected, atol=1e-5)
    for layer, weight in zip(ranks, before, strict=True):
        layer.unmerge()
        np.testing.assert_array_equal(layer.weight.numpy(), weight)


def test_rows_add_up_to_the_whole_layer(monkeypatch) -> None:
    full = full_layer()
    ranks = row_ranks(full)
    x = paddle.randn([2, 5, IN])
    expected = full(x).numpy()
    np.testing.assert_allclose(run_rows(ranks, x, monkeypatch), expected, atol=1e-5)
    full.merge()
    for rank, layer in enumerate(ranks):
        layer.merge()
        np.testing.assert_allclose(layer.weight.numpy(), part(full.weight, rank, 0), atol=1e-6)
    np.testing.assert_allclose(run_rows(ranks, x, monkeypatch), expected, atol=1e-5)


def test_an_input_that_is_not_parallel_is_split_for_the_branch(monkeypatch) -> None:
    full = full_layer()
    x = paddle.randn([3, IN])
    for rank, layer in enumerate(row_ranks(full)):
        layer.input_is_parallel = False
        split = part(x, rank, -1)
        monkeypatch.setattr(mp_ops, "_c_split", lambda _, group, split=split: split)
        monkeypatch.setattr(mp_ops, "_mp_allreduce", lambda tensor, **_: tensor)
        W, A = part(full.weight, rank, 0), part(full.lora_A, rank, 0)
        expected = split @ W + full.bias + split @ A @ full.lora_B * (ALPHA / R)
        np.testing.assert_allclose(layer(x).numpy(), expected.numpy(), atol=1e-5)


def test_columns_that_are_gathered(monkeypatch) -> None:
    layer = column_ranks(full_layer())[0]
    x = paddle.randn([3, IN])
    monkeypatch.setattr(mp_ops, "_c_identity", lambda x, **_: x)
    monkeypatch.setattr(mp_ops, "_c_concat", lambda x, group: paddle.concat([x, x * 2], -1))
    own = layer(x).numpy()
    layer.gather_output = True
    np.testing.assert_allclose(layer(x).numpy(), np.concatenate([own, own * 2], -1), atol=1e-5)


def test_fused_columns_add_up(monkeypatch) -> None:
    enable, head_dim, heads = [True, False, True], 2, 4
    outputs = heads * len(enable) * head_dim
    full = LoRAMergedLinear(IN, outputs, head_dim, R, ALPHA, enable_lora=enable)
    for parameter in full.parameters():
        parameter.set_value(paddle.randn(parameter.shape) * 0.5)
    ranks = []
    for rank in range(RANKS):
        layer = ColumnParallelLoRAMergedLinear(
            IN,
            outputs,
            head_dim,
            R,
            ALPHA,
            enable_lora=enable,
            mp_group=group(rank),
            has_bias=True,
            gather_output=False,
        )
        layer.weight.set_value(part(full.weight, rank, 1))
        layer.bias.set_value(part(full.bias, rank, 0))
        layer.lora_A.set_value(full.lora_A)
        layer.lora_B.set_value(part(full.lora_B, rank, 1))
        ranks.append(layer)
    x = paddle.randn([2, IN])
    full.train()
    expected = full(x).numpy()
    np.testing.assert_allclose(run_columns(ranks, x, monkeypatch), expected, atol=1e-5)
    for layer in ranks:
        layer.merge()
    np.testing.assert_allclose(run_columns(ranks, x, monkeypatch), expected, atol=1e-5)


def test_slices_are_marked_for_fleet() -> None:
    column, row = column_ranks(full_layer())[0], row_ranks(full_layer())[0]
    assert column.lora_B.is_distributed
    assert column.lora_B.split_axis == 1
    assert not column.lora_A.is_distributed
    assert row.lora_A.is_distributed
    assert row.lora_A.split_axis == 0
    assert not row.lora_B.is_distributed


class OneRank(nn.Layer):
    def __init__(self) -> None:
        super().__init__()
        one = group(ranks=1)
        self.up = ColumnParallelLinear(IN, 2 * IN, has_bias=True, gather_output=True, mp_group=one)
        self.down = RowParallelLinear(2 * IN, IN, has_bias=False, mp_group=one)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.down(nn.functional.relu(self.up(x)))


def test_a_model_with_parallel_layers_on_one_rank() -> None:
    net, x = OneRank(), paddle.randn([4, IN])
    before = net(x).numpy()
    model = LoRAModel(net, LoRAConfig(r=R, target_modules=["up", "down"], lora_plus_scale=2.0))
    assert isinstance(net.up, ColumnParallelLoRALinear)
    assert isinstance(net.down, RowParallelLoRALinear)
    np.testing.assert_array_equal(model(x).numpy(), before)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.set_value(paddle.randn(parameter.shape))
    tuned = model(x).numpy()
    assert np.abs(tuned - before).max() > 0.5
    model.merge()
    np.testing.assert_allclose(model(x).numpy(), tuned, atol=1e-4)
    np.testing.assert_array_equal(model.restore_original_model()(x).numpy(), before)


def test_fused_parallel_targets() -> None:
    net = OneRank()
    options = {"enable_lora_list": [True, False], "head_dim": 4}
    LoRAModel(net, LoRAConfig(r=R, target_modules="up", **options))
    assert isinstance(net.up, ColumnParallelLoRAMergedLinear)


@pytest.mark.parametrize("layer", [ColumnParallelLoRALinear, RowParallelLoRALinear])
def test_what_parallel_layers_refuse(layer: type) -> None:
    with pytest.raises(ValueError, match="positive integer"):
        layer(IN, OUT, 0, mp_group=group())
    with pytest.raises(ValueError, match="pissa"):
        layer(IN, OUT, R, pissa=True, mp_group=group())
    with pytest.raises(ValueError, match="use_mora"):
        layer(IN, OUT, R, use_mora=True, mp_group=group())
    with pytest.raises(ValueError, match="pissa"):
        LoRAModel(OneRank(), LoRAConfig(target_modules=["up"], pissa=True))
