"""Adapters of models that are spread over tensor-parallel ranks: saved, gathered, split and read.

The ranks are played one after the other: fleet's layers have no CPU kernels.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from adapters_tiny import fill_branches, logits, tiny_llama
from paddle import nn
from paddle.distributed import fleet
from paddle.distributed.fleet.layers.mpu import mp_layers
from paddle.distributed.fleet.meta_parallel import ColumnParallelLinear, RowParallelLinear

from peft_deploy.adapters import read_adapter, write_adapter
from peft_deploy.adapters.arrays import to_array
from peft_deploy.adapters.lora import LoRAConfig, LoRAModel, ranks, row_parallel
from peft_deploy.errors import AdapterError, UnsupportedModelError
from peft_deploy.families import find_family, parallel_axes
from peft_deploy.weights.tensor_parallel import split_shards

WIDTH, HIDDEN, R = 8, 16, 3
Group = SimpleNamespace


class Block(nn.Layer):
    """A column and a row layer as one of ``degree`` ranks holds them, and a norm that all hold."""

    def __init__(self, rank: int = 0, degree: int = 1) -> None:
        super().__init__()
        group = Group(nranks=degree, rank=rank, id=0)
        if degree > 1:
            self.config = SimpleNamespace(tensor_parallel_degree=degree, tensor_parallel_rank=rank)
        self.up = ColumnParallelLinear(
            WIDTH, HIDDEN, has_bias=True, gather_output=False, mp_group=group
        )
        self.down = RowParallelLinear(
            HIDDEN, WIDTH, has_bias=True, input_is_parallel=True, mp_group=group
        )
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.norm(self.down(nn.functional.relu(self.up(x))))


@pytest.fixture(autouse=True)
def strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        fleet.fleet, "_user_defined_strategy", fleet.DistributedStrategy(), raising=False
    )
    tracker = SimpleNamespace(rng_state=lambda: nullcontext())
    monkeypatch.setattr(mp_layers, "get_rng_state_tracker", lambda: tracker)
    monkeypatch.setattr(row_parallel, "get_rng_state_tracker", lambda: tracker)


def config() -> LoRAConfig:
    return LoRAConfig(
        r=R,
        lora_alpha=2 * R,
        target_modules=["up", "down"],
        trainable_bias="lora",
        trainable_modules=["norm"],
    )


def whole_adapter(folder: Path) -> LoRAModel:
    """On one card, every tensor far from zero."""
    model = LoRAModel(Block(), config())
    fill_branches(model, scale=0.7)
    model.save_pretrained(folder)
    return model


def arrays(model: LoRAModel) -> dict[str, np.ndarray]:
    return {name: to_array(t) for name, t in model.get_trainable_state_dict().items()}


def spread(adapter: Path, degree: int) -> list[LoRAModel]:
    return [LoRAModel.from_pretrained(Block(rank, degree), adapter) for rank in range(degree)]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[LoRAModel], int], None]:
    """Makes fleet's group of ranks one in which the others have already sent what they hold."""

    def play(models: list[LoRAModel], rank: int, nranks: int | None = None) -> None:
        group = Group(nranks=nranks or len(models), rank=rank)
        monkeypatch.setattr(ranks, "_model_parallel_group", lambda: group)

        def gathered(into: list, sent: dict, group: Group) -> None:
            states = [arrays(model) for model in models]
            assert all(np.array_equal(states[rank][name], sent[name]) for name in sent)
            into.extend(states)

        monkeypatch.setattr(paddle.distributed, "all_gather_object", gathered)

    return play


@pytest.mark.parametrize("degree", [2, 4])
def test_each_rank_takes_its_part_of_a_whole_adapter(degree: int, tmp_path: Path) -> None:
    assert R % degree
    whole = arrays(whole_adapter(tmp_path / "whole"))
    axes = {"up.lora_B": 1, "up.bias": 0, "down.lora_A": 0}
    for rank, model in enumerate(spread(tmp_path / "whole", degree)):
        own = arrays(model)
        assert set(own) == set(whole) and len(whole) == 8
        for name, array in whole.items():
            parts = np.split(array, degree, axes[name]) if name in axes else [array] * degree
            np.testing.assert_array_equal(own[name], parts[rank])
        assert model.lora_config.tensor_parallel_degree == degree


@pytest.mark.parametrize("degree", [2, 4])
def test_ranks_merge_to_the_slices_of_the_merged_layer(degree: int, tmp_path: Path) -> None:
    """x @ (W + s·A·B) of all ranks together is that of one card."""
    whole = whole_adapter(tmp_path)
    delta = {
        name: layer.get_delta_weight().numpy()
        for name, layer in (("up", whole.model.up), ("down", whole.model.down))
    }
    models = spread(tmp_path, degree)
    up = [model.model.up.get_delta_weight().numpy() for model in models]
    down = [model.model.down.get_delta_weight().numpy() for model in models]
    assert all(np.abs(change).max() > 0.5 for change in delta.values())
    np.testing.assert_allclose(np.concatenate(up, 1), delta["up"], atol=1e-6)
    np.testing.assert_allclose(np.concatenate(down, 0), delta["down"], atol=1e-6)


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("variant", [None, "tp00"])
def test_merge_tensor_parallel_writes_the_whole_adapter(
    degree: int, variant: str | None, play, tmp_path: Path
) -> None:
    whole = arrays(whole_adapter(tmp_path / "whole"))
    models = spread(tmp_path / "whole", degree)
    for rank in reversed(range(degree)):
        play(models, rank)
        assert not (tmp_path / "saved").exists()
        models[rank].save_pretrained(
            tmp_path / "saved", merge_tensor_parallel=True, variant=variant
        )
    saved = read_adapter(tmp_path / "saved")
    assert (tmp_path / "saved" / "lora_model_state.pdparams").is_file()
    assert saved.config.tensor_parallel_degree == -1
    assert saved.provenance is not None and not saved.provenance.base_weights
    assert list(saved.state) == list(whole)
    for name, array in whole.items():
        np.testing.assert_array_equal(saved.state[name], array)
    assert arrays(LoRAModel.from_pretrained(Block(), tmp_path / "saved")).keys() == whole.keys()


def test_the_variant_keeps_what_is_not_the_rank() -> None:
    assert ranks.without_rank("tp01_pp02") == "pp02"
    assert ranks.without_rank("best") == "best"
    assert ranks.without_rank("tp00") is ranks.without_rank(None) is None


def test_every_rank_saves_and_reads_its_own_file(play, tmp_path: Path) -> None:
    whole_adapter(tmp_path / "whole")
    models = spread(tmp_path / "whole", 2)
    for rank, model in enumerate(models):
        play(models, rank)
        model.save_pretrained(
            tmp_path / "ranks", merge_tensor_parallel=False, is_main_process=rank == 0
        )
    names = {path.name for path in (tmp_path / "ranks").iterdir()}
    assert {f"lora_model_state.tp0{rank}.pdparams" for rank in range(2)} <= names
    assert "lora_model_state.pdparams" not in names
    for rank, model in enumerate(models):
        play(models, rank)
        again = LoRAModel.from_pretrained(Block(rank, 2), tmp_path / "ranks")
        again.load_adapter(tmp_path / "ranks", "second")
        again.set_adapter("second")
        for name, array in arrays(model).items():
            np.testing.assert_array_equal(arrays(again)[name], array)


def test_resuming_splits_as_paddlenlp_s_trainer_asks(tmp_path: Path) -> None:
    whole = arrays(whole_adapter(tmp_path))
    model = LoRAModel(Block(1, 2), config())
    part = model._convert_tensor_parallel(whole)
    model.set_state_dict(part)
    np.testing.assert_array_equal(arrays(model)["up.lora_B"], whole["up.lora_B"][:, HIDDEN // 2 :])


def test_gathering_without_fleet_or_with_another_number_of_ranks(play, tmp_path: Path) -> None:
    whole_adapter(tmp_path / "whole")
    models = spread(tmp_path / "whole", 2)
    with pytest.raises(AdapterError, match="all 2 tensor-parallel ranks, but fleet is not"):
        models[0].save_pretrained(tmp_path / "saved", merge_tensor_parallel=True)
    play(models, 0, nranks=4)
    with pytest.raises(AdapterError, match="but fleet's group has 4") as caught:
        models[0].save_pretrained(tmp_path / "saved", merge_tensor_parallel=True)
    assert caught.value.hint is not None and "merge_tensor_parallel=False" in caught.value.hint
    assert not (tmp_path / "saved").exists()


def test_ranks_that_have_drifted_apart_are_not_merged(play, tmp_path: Path) -> None:
    whole_adapter(tmp_path / "whole")
    models = spread(tmp_path / "whole", 2)
    A = models[1].model.up.lora_A
    A.set_value(A + 0.25)
    play(models, 0)
    with pytest.raises(AdapterError, match=r"up\.lora_A should be the same .* by up to 0\.25"):
        models[0].save_pretrained(tmp_path / "saved", merge_tensor_parallel=True)


def llama_ranks(folder: Path, degree: int = 2) -> LoRAModel:
    """A tuned llama, and the files that the ranks of a tensor-parallel one would have written."""
    model = LoRAModel(tiny_llama(), LoRAConfig(r=R, target_modules=["q_proj", "down_proj"]))
    fill_branches(model)
    described = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    axis_of = parallel_axes(find_family(described), described, degree)
    options = replace(model.lora_config, tensor_parallel_degree=degree)
    for rank, shard in enumerate(split_shards(arrays(model), degree, axis_of)):
        write_adapter(folder, options, shard, variant=f"tp{rank:02}")
    return model


@pytest.mark.parametrize("degree", [2, 4])
def test_the_files_of_ranks_load_on_one_card(degree: int, tmp_path: Path) -> None:
    expected = logits(llama_ranks(tmp_path, degree))
    loaded = LoRAModel.from_pretrained(tiny_llama(), tmp_path)
    assert np.abs(logits(tiny_llama()) - expected).max() > 0.1
    np.testing.assert_allclose(logits(loaded), expected, atol=1e-6)
    named = LoRAModel(tiny_llama(), LoRAConfig(r=2, target_modules=["v_proj"]))
    named.load_adapter(tmp_path, "ranks")
    named.set_adapter("ranks")
    np.testing.assert_allclose(logits(named), expected, atol=1e-6)


def test_the_files_of_ranks_of_an_unknown_model(tmp_path: Path) -> None:
    class Unheard(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.down_proj = nn.Linear(4, 4), nn.Linear(4, 4)
            self.config = SimpleNamespace(to_dict=lambda: {"model_type": "unheard_of"})

    llama_ranks(tmp_path)
    with pytest.raises(UnsupportedModelError) as caught:
        LoRAModel.from_pretrained(Unheard(), tmp_path)
    assert caught.value.hint is not None and "merge_tensor_parallel=True" in caught.value.hint
    assert json.loads((tmp_path / "lora_config.json").read_text())["tensor_parallel_degree"] == 2
