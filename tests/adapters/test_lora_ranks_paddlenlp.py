"""PaddleNLP's own models on tensor-parallel ranks: adapters move between this package and
paddlenlp.peft at every number of ranks.

Fleet is made to believe in ranks that are played one after the other. Nothing is computed: its
layers have no CPU kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from adapters_tiny import SIZES, fill_branches, logits
from paddle import nn
from paddle.distributed import fleet
from paddle.distributed.fleet.base import topology
from paddle.distributed.fleet.layers.mpu.random import get_rng_state_tracker
from paddlenlp import peft as reference
from paddlenlp import transformers

from peft_deploy.adapters import lora as ours
from peft_deploy.adapters import read_adapter
from peft_deploy.adapters.arrays import to_array
from peft_deploy.adapters.lora import LoRAConfig, LoRAModel
from peft_deploy.adapters.lora.column_order import reordered_columns
from peft_deploy.errors import AdapterError, UnsupportedModelError
from peft_deploy.families import find_family

pytestmark = pytest.mark.filterwarnings("ignore")

R = 5
OPTIONS = {
    "Llama": {
        "target_modules": [".*_proj"],
        "trainable_modules": [".*norm.*", "lm_head.weight", ".*embed_tokens.weight"],
    },
    "Qwen2": {  # has biases in column layers
        "target_modules": [".*_proj"],
        "trainable_bias": "lora",
        "trainable_modules": [".*norm.*"],
    },
}
Build = Callable[..., nn.Layer]


class Topology:
    """What fleet says of one of ``degree`` ranks."""

    def __init__(self, rank: int, degree: int) -> None:
        self.group = SimpleNamespace(
            nranks=degree, world_size=degree, rank=rank, id=0, is_member=lambda: True
        )

    def get_model_parallel_group(self) -> SimpleNamespace:
        return self.group

    def get_model_parallel_world_size(self) -> int:
        return int(self.group.nranks)

    def get_model_parallel_rank(self) -> int:
        return int(self.group.rank)

    def get_pipe_parallel_world_size(self) -> int:
        return 1

    def get_sharding_parallel_world_size(self) -> int:
        return 1


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Build:
    """Makes a tiny model of a family, as one card or one of ``degree`` ranks has it."""
    monkeypatch.setattr(
        fleet.fleet, "_user_defined_strategy", fleet.DistributedStrategy(), raising=False
    )
    monkeypatch.setattr(fleet.fleet, "_hcg", None, raising=False)
    tracker = get_rng_state_tracker()
    monkeypatch.setattr(tracker, "states_", {})
    monkeypatch.setattr(tracker, "seeds_", set())
    tracker.add("model_parallel_rng", 5)

    def build(family: str, rank: int = 0, degree: int = 1, **options: object) -> nn.Layer:
        spread = {"tensor_parallel_degree": degree, "tensor_parallel_rank": rank}
        fake = Topology(rank, degree) if degree > 1 else None
        monkeypatch.setattr(fleet.fleet, "_hcg", fake)
        monkeypatch.setattr(topology, "_HYBRID_PARALLEL_GROUP", fake)
        if family in OPTIONS:
            options = {"num_key_value_heads": 2, **options}
        sizes = {**SIZES, "vocab_size": 68, **options, **(spread if degree > 1 else {})}
        paddle.seed(0)
        config = getattr(transformers, f"{family}Config")(**sizes)
        for name, value in options.items():  # the constructor leaves fuse_attention_ffn as it is
            setattr(config, name, value)
        return getattr(transformers, f"{family}ForCausalLM")(config).eval()

    return build


def arrays(model: LoRAModel) -> dict[str, np.ndarray]:
    return {name: to_array(t) for name, t in model.get_trainable_state_dict().items()}


def same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    return first.keys() == second.keys() and all(
        np.array_equal(first[name], second[name]) for name in first
    )


def whole_adapter(build: Build, family: str, folder: Path) -> dict[str, np.ndarray]:
    """Saved from one card, every tensor far from zero."""
    model = LoRAModel(build(family), LoRAConfig(r=R, lora_alpha=7, **OPTIONS[family]))
    fill_branches(model)
    model.save_pretrained(folder)
    return arrays(model)


CASES = [("Llama", 2), ("Llama", 4), ("Qwen2", 2)]  # the key heads of four ranks stay whole


@pytest.mark.parametrize(("family", "degree"), CASES)
def test_each_rank_gets_what_the_reference_gives_it(
    build: Build, family: str, degree: int, tmp_path: Path
) -> None:
    whole = whole_adapter(build, family, tmp_path)
    for rank in range(degree):
        model = LoRAModel.from_pretrained(build(family, rank, degree), tmp_path)
        theirs = reference.LoRAModel.from_pretrained(build(family, rank, degree), str(tmp_path))
        assert same(arrays(model), arrays(theirs))
        smaller = {name for name, array in arrays(model).items() if array.size < whole[name].size}
        assert {n for n in smaller if n.endswith("o_proj.lora_A")}
        assert {n for n in smaller if n.endswith("q_proj.lora_B")}
        assert bool({n for n in smaller if n.endswith("k_proj.lora_B")}) == (degree == 2)
        assert bool({n for n in smaller if n.endswith("q_proj.bias")}) == (family == "Qwen2")


@pytest.mark.parametrize(("writer", "reader"), [("ours", "reference"), ("reference", "ours")])
def test_the_files_of_ranks_move(build: Build, writer: str, reader: str, tmp_path: Path) -> None:
    sides = {"ours": ours, "reference": reference}
    whole_adapter(build, "Llama", tmp_path / "whole")
    states = []
    for rank in range(2):
        model = sides[writer].LoRAModel.from_pretrained(
            build("Llama", rank, 2), str(tmp_path / "whole")
        )
        model.save_pretrained(
            str(tmp_path / "ranks"), merge_tensor_parallel=False, is_main_process=rank == 0
        )
        states.append(arrays(model))
    for rank in range(2):
        model = sides[reader].LoRAModel.from_pretrained(
            build("Llama", rank, 2), str(tmp_path / "ranks")
        )
        assert same(arrays(model), states[rank])


@pytest.mark.parametrize(("saved", "wanted"), [(2, 1), (4, 1), (4, 2), (2, 4)])
def test_another_number_of_ranks_reads_them(
    build: Build, saved: int, wanted: int, tmp_path: Path
) -> None:
    whole = whole_adapter(build, "Llama", tmp_path / "whole")
    for rank in range(saved):
        model = LoRAModel.from_pretrained(build("Llama", rank, saved), tmp_path / "whole")
        model.save_pretrained(
            tmp_path / "ranks", merge_tensor_parallel=False, is_main_process=rank == 0
        )
    for rank in range(wanted):
        read = LoRAModel.from_pretrained(build("Llama", rank, wanted), tmp_path / "ranks")
        split = LoRAModel.from_pretrained(build("Llama", rank, wanted), tmp_path / "whole")
        assert same(arrays(read), arrays(split))
    assert (wanted > 1) or same(arrays(read), whole)


@pytest.mark.parametrize(("family", "degree"), CASES)
def test_gathered_ranks_are_the_adapter_on_one_card(
    build: Build, family: str, degree: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = whole_adapter(build, family, tmp_path / "whole")
    models = [
        LoRAModel.from_pretrained(build(family, rank, degree), tmp_path / "whole")
        for rank in range(degree)
    ]
    monkeypatch.setattr(
        paddle.distributed,
        "all_gather_object",
        lambda into, _sent, group: into.extend(arrays(model) for model in models),
    )
    monkeypatch.setattr(fleet.fleet, "_hcg", Topology(0, degree))
    models[0].save_pretrained(tmp_path / "merged", merge_tensor_parallel=True, variant="tp00")
    assert same(dict(read_adapter(tmp_path / "merged").state), whole)
    expected = logits(LoRAModel.from_pretrained(build(family), tmp_path / "whole"))
    theirs = reference.LoRAModel.from_pretrained(build(family), str(tmp_path / "merged"))
    assert np.abs(logits(build(family)) - expected).max() > 0.01
    np.testing.assert_allclose(logits(theirs), expected, rtol=1e-5, atol=1e-5)


def test_files_of_ranks_of_a_family_whose_layers_are_not_known(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = find_family({"architectures": ["Qwen2ForCausalLM"]})
    monkeypatch.setattr(type(family), "parallel_rules", ())
    whole_adapter(build, "Qwen2", tmp_path / "whole")
    for rank in range(2):
        model = LoRAModel.from_pretrained(build("Qwen2", rank, 2), tmp_path / "whole")
        model.save_pretrained(
            tmp_path / "ranks", merge_tensor_parallel=False, is_main_process=rank == 0
        )
    with pytest.raises(UnsupportedModelError, match="Qwen2ForCausalLM") as caught:
        LoRAModel.from_pretrained(build("Qwen2"), tmp_path / "ranks")
    assert caught.value.hint is not None and "merge_tensor_parallel=True" in caught.value.hint


CHATGLM = {
    "padded_vocab_size": 68,
    "ffn_hidden_size": 48,
    "multi_query_group_num": 2,
    "kv_channels": 8,
}
SIDE_BY_SIDE = {
    "query, key, value": ("QWen", "c_attn", {"kv_channels": 8, "seq_length": 64}),
    "gate, up": ("Llama", "gate_up_fused_proj", {"fuse_attention_ffn": True}),
    "multi-query": (
        "ChatGLMv2",
        "query_key_value",
        CHATGLM,
    ),
    "feed-forward": (
        "ChatGLMv2",
        "dense_h_to_4h",
        CHATGLM,
    ),
}


@pytest.mark.parametrize("case", SIDE_BY_SIDE)
def test_slices_of_matrices_side_by_side_are_refused(
    build: Build, case: str, tmp_path: Path
) -> None:
    family, target, options = SIDE_BY_SIDE[case]
    config = LoRAConfig(r=R, target_modules=[f".*{target}"])
    one = LoRAModel(build(family, **options), config)
    fill_branches(one)
    one.save_pretrained(tmp_path / "whole")
    model = build(family, 1, 2, **options)
    with pytest.raises(AdapterError, match=f"{target}.lora_B.*several matrices side by side"):
        LoRAModel.from_pretrained(model, tmp_path / "whole")
    spread = LoRAModel(model, config)
    fill_branches(spread)
    spread.save_pretrained(
        tmp_path / "ranks", merge_tensor_parallel=False, is_main_process=True
    )  # for as many ranks again
    assert (tmp_path / "ranks" / "lora_model_state.tp01.pdparams").is_file()


def test_heads_side_by_side_are_slices_of_the_whole(build: Build) -> None:
    assert not reordered_columns(build("GPT", 1, 2), 2)
    assert not reordered_columns(build("Bloom", 1, 2, n_layer=2, n_head=4), 2)
    assert not reordered_columns(build("Llama", 1, 2, fuse_attention_qkv=True), 2)
    assert not reordered_columns(nn.Linear(2, 2), 2)
    fused = reordered_columns(build("Llama", 1, 2, fuse_attention_ffn=True), 2)
    assert fused == {f"llama.layers.{i}.mlp.gate_up_fused_proj" for i in range(2)}
