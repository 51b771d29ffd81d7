from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_deploy.errors import AdapterError, UnsupportedModelError
from peft_deploy.families import find_family, parallel_axes
from peft_deploy.weights import DTYPES, Array
from peft_deploy.weights.tensor_parallel import merge_shards, split_shards

LLAMA = find_family({"architectures": ["LlamaForCausalLM"]})
SIZES = {"hidden_size": 24, "intermediate_size": 40, "vocab_size": 36, "num_hidden_layers": 2}
ATTENTION = "llama.layers.1.self_attn"
MLP = "llama.layers.0.mlp"


def config(heads: int = 4, kv_heads: int = 4, **changes: int) -> dict[str, int]:
    return {**SIZES, "num_attention_heads": heads, "num_key_value_heads": kv_heads, **changes}


def adapter_state(
    rank: int, seed: int = 0, kv_heads: int = 4, dtype: str = "float32"
) -> dict[str, Array]:
    """LoRA on every layer, and a norm, a head and an embedding trained whole."""
    rng = np.random.default_rng(seed)
    E, F, V, KV = 24, 40, 36, kv_heads * 6

    def draw(*shape: int) -> Array:
        return (rng.standard_normal(shape) + 0.5).astype(DTYPES[dtype])

    sizes = {
        f"{ATTENTION}.q_proj": (E, E),
        f"{ATTENTION}.k_proj": (E, KV),
        f"{ATTENTION}.v_proj": (E, KV),
        f"{ATTENTION}.o_proj": (E, E),
        f"{MLP}.gate_proj": (E, F),
        f"{MLP}.up_proj": (E, F),
        f"{MLP}.down_proj": (F, E),
    }
    state = {}
    for module, (into, out) in sizes.items():
        state[f"{module}.lora_A"] = draw(into, rank)
        state[f"{module}.lora_B"] = draw(rank, out)
    state[f"{ATTENTION}.q_proj.bias"] = draw(E)
    state[f"{MLP}.down_proj.bias"] = draw(E)
    state["llama.norm.weight"] = draw(E)
    state["lm_head.weight"] = draw(E, V)
    state["llama.embed_tokens.weight"] = draw(V, E)
    return state


def same(first: Mapping[str, Array], second: Mapping[str, Array]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype
        and first[name].shape == second[name].shape
        and first[name].tobytes() == second[name].tobytes()
        for name in first
    )


@settings(max_examples=40, deadline=None)
@given(
    degree=st.sampled_from([1, 2, 4]),
    rank=st.integers(1, 9),
    kv_heads=st.sampled_from([1, 2, 4]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    seed=st.integers(0, 100),
)
def test_merging_undoes_splitting(
    degree: int, rank: int, kv_heads: int, dtype: str, seed: int
) -> None:
    state = adapter_state(rank, seed, kv_heads, dtype)
    axis_of = parallel_axes(LLAMA, config(kv_heads=kv_heads), degree)
    shards = split_shards(state, degree, axis_of)
    assert len(shards) == degree
    assert same(merge_shards(shards, axis_of), state)
    if degree > 1:
        assert not same(merge_shards(shards[::-1], axis_of), state)
    again = split_shards(merge_shards(shards, axis_of), degree, axis_of)
    assert all(same(a, b) for a, b in zip(shards, again, strict=True))


@pytest.mark.parametrize("degree", [2, 4])
def test_the_ranks_compute_together_what_one_does(degree: int) -> None:
    """What fleet's layers do: columns are set side by side, the results of rows are added."""
    state = adapter_state(rank=5)
    shards = split_shards(state, degree, parallel_axes(LLAMA, config(), degree))
    rng = np.random.default_rng(1)
    for module, by in ((f"{ATTENTION}.v_proj", "column"), (f"{MLP}.down_proj", "row")):
        A, B = (state[f"{module}.lora_{half}"].astype(np.float64) for half in "AB")
        x = rng.standard_normal((3, len(A)))
        parts = [(s[f"{module}.lora_A"], s[f"{module}.lora_B"]) for s in shards]
        if by == "column":
            together = np.concatenate([x @ a @ b for a, b in parts], axis=1)
        else:
            slices = np.split(x, degree, axis=1)
            together = sum(part @ a @ b for part, (a, b) in zip(slices, parts, strict=True))
        np.testing.assert_allclose(together, x @ A @ B, rtol=1e-5)
    bias = f"{ATTENTION}.q_proj.bias"
    assert np.array_equal(np.concatenate([s[bias] for s in shards]), state[bias])
    assert all(s[f"{MLP}.down_proj.bias"] is not None for s in shards)
    assert shards[1][f"{MLP}.down_proj.bias"].shape == (24,)
    assert shards[1]["lm_head.weight"].shape == (24, 36 // degree)
    assert shards[1]["llama.embed_tokens.weight"].shape == (36 // degree, 24)
    assert shards[1]["llama.norm.weight"].shape == (24,)


@pytest.mark.parametrize("degree", [2, 4])
def test_the_reference_splits_alike(degree: int) -> None:
    from peft_deploy.environment import require_paddle

    require_paddle("the test")
    from paddlenlp.transformers.conversion_utils import split_or_merge_func

    state = adapter_state(rank=3)
    shards = split_shards(state, degree, parallel_axes(LLAMA, config(), degree))
    # as its LoRAModel maps them: B of column layers, A of row layers
    spread = {f"{ATTENTION}.q_proj.lora_B": True, f"{MLP}.down_proj.lora_A": False}
    spread |= {"lm_head.weight": True, "llama.embed_tokens.weight": False}
    for name, is_column in spread.items():
        for rank, shard in enumerate(shards):
            split = split_or_merge_func(True, degree, rank, num_attention_heads=4)
            assert np.array_equal(split(state[name], is_column=is_column), shard[name])
        merge = split_or_merge_func(False, degree, 0, num_attention_heads=4)
        merged = merge([shard[name] for shard in shards], is_column=is_column)
        assert np.array_equal(merged, state[name])


def test_too_few_key_heads_stay_whole_on_every_rank() -> None:
    state = adapter_state(rank=4, kv_heads=2)
    axis_of = parallel_axes(LLAMA, config(kv_heads=2), 4)
    shards = split_shards(state, 4, axis_of)
    for name in ("lora_A", "lora_B"):
        key = f"{ATTENTION}.k_proj.{name}"
        assert all(np.array_equal(shard[key], state[key]) for shard in shards)
    assert shards[3][f"{ATTENTION}.q_proj.lora_B"].shape == (4, 6)


def test_a_vocabulary_that_does_not_divide_stays_whole() -> None:
    state = {"lm_head.weight": np.ones((24, 35)), "llama.embed_tokens.weight": np.ones((35, 24))}
    for shard in split_shards(state, 2, parallel_axes(LLAMA, config(vocab_size=35), 2)):
        assert same(shard, state)


# What cannot be done.


def test_heads_that_do_not_divide() -> None:
    with pytest.raises(
        AdapterError, match=r"q_proj cannot be spread over 3 ranks: num_heads is 4"
    ):
        parallel_axes(LLAMA, config(), 3)


def test_features_that_do_not_divide() -> None:
    state = {f"{MLP}.up_proj.lora_B": np.ones((2, 42), np.float32)}
    with pytest.raises(AdapterError, match=r"is \[2, 42\]; its axis 1 cannot be divided among 4"):
        split_shards(state, 4, parallel_axes(LLAMA, config(), 4))


def test_a_layer_that_the_family_does_not_know() -> None:
    axis_of = parallel_axes(LLAMA, config(), 2)
    with pytest.raises(AdapterError, match=r"has no layer llama\.layers\.0\.router"):
        split_shards({"llama.layers.0.router.lora_A": np.ones((2, 2))}, 2, axis_of)


def test_a_family_that_says_nothing() -> None:
    class Silent(type(LLAMA)):  # type: ignore[misc]
        parallel_rules = ()

    with pytest.raises(UnsupportedModelError, match="is not known"):
        parallel_axes(Silent(), config(), 2)


def broken(change) -> str:
    axis_of = parallel_axes(LLAMA, config(), 2)
    shards = split_shards(adapter_state(rank=4), 2, axis_of)
    change(shards)
    with pytest.raises(AdapterError) as caught:
        merge_shards(shards, axis_of)
    return caught.value.message


def test_ranks_that_do_not_belong_together() -> None:
    A, B = f"{ATTENTION}.q_proj.lora_A", f"{ATTENTION}.q_proj.lora_B"

    def nudge(shards) -> None:
        shards[1][A] = shards[1][A] + np.float32(0.25)

    assert (
        f"{A} should be the same on all ranks, but rank 1 differs from rank 0 by up to 0.25"
        in (broken(nudge))
    )
    assert "rank 0 lacks tensors" in broken(lambda shards: shards[0].pop(B))

    def reshape(shards) -> None:
        shards[1][B] = shards[1][B][:, :6]

    assert "rank 0: float32 [4, 12]\n  rank 1: float32 [4, 6]" in broken(reshape)

    def narrow(shards) -> None:
        shards[0][B] = shards[0][B].astype(np.float16)

    assert f"{B} differs between the ranks:\n  rank 0: float16" in broken(narrow)


def test_no_ranks_at_all() -> None:
    axis_of = parallel_axes(LLAMA, config(), 1)
    with pytest.raises(AdapterError, match="no rank"):
        merge_shards([], axis_of)
    with pytest.raises(AdapterError, match="0 ranks"):
        split_shards({}, 0, axis_of)
