"""Where every number of a prefix comes to lie, for any sizes."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_deploy.adapters.formats.prefix import PrefixAdapter
from peft_deploy.adapters.prefix.postprocess import arrange_past
from peft_deploy.config import PrefixConfig
from peft_deploy.families import find_family, find_past_rule, known_architectures, past_dims

LAYOUTS = ["BSKD", "SBKD", "BKSD", "BSDK", "DKSB"]
sizes = st.fixed_dictionaries({letter: st.integers(1, 4) for letter in "BSKDL"})


def adapter(
    state: dict[str, np.ndarray], size: dict[str, int], **options: object
) -> PrefixAdapter:
    config = PrefixConfig(
        num_prefix_tokens=size["S"],
        num_attention_heads=2 * size["K"],
        multi_query_group_num=size["K"],
        num_hidden_layers=size["L"],
        hidden_size=7,
        **options,
    )
    return PrefixAdapter(Path("prefix"), config, state)


@settings(deadline=None)
@given(sizes, st.sampled_from(LAYOUTS))
def test_numbers_find_their_places(size: dict[str, int], layout: str) -> None:
    """Both ways out of the weights agree with the definition, number by number."""
    B, P, K, D, L = (size[letter] for letter in "BSKDL")
    weight = np.arange(P * 2 * L * K * D, dtype=np.float32).reshape(P, -1)
    prefix = adapter({"0.weight": weight}, size)
    assert prefix.head_dim == D
    caches = prefix.pre_caches()
    encoded = paddle.to_tensor(np.stack([weight * (b + 1) for b in range(B)]))
    pairs = arrange_past(encoded.reshape([B, P, 2 * L, K, D]), layout)
    halves = [[half.numpy() for half in pair] for pair in pairs]
    assert len(halves) == L
    for layer, half, k, p, d in product(range(L), range(2), range(K), range(P), range(D)):
        wanted = weight[p, ((half * L + layer) * K + k) * D + d]
        assert caches[layer, half, k, p, d] == wanted
        for b in range(B):
            at = {"B": b, "S": p, "K": k, "D": d}
            found = halves[layer][half][tuple(at[letter] for letter in layout)]
            assert found == wanted * (b + 1)


@settings(deadline=None)
@given(sizes, st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_a_projection_is_linear_tanh_linear(size: dict[str, int], hidden: int, seed: int) -> None:
    P, K, D, L = (size[letter] for letter in "SKDL")
    generator = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape).astype(np.float32)

    wide = 2 * L * K * D
    state = {
        "0.weight": normal(P, K * D),
        "1.weight": normal(K * D, hidden),
        "1.bias": normal(hidden),
        "3.weight": normal(hidden, wide),
        "3.bias": normal(wide),
    }
    options = {"prefix_projection": True, "prefix_projection_hidden_size": hidden}
    prefix = adapter(state, size, **options)
    exact = {name: array.astype(np.float64) for name, array in state.items()}
    rows = np.tanh(exact["0.weight"] @ exact["1.weight"] + exact["1.bias"])
    rows = rows @ exact["3.weight"] + exact["3.bias"]
    wanted = rows.reshape(P, 2, L, K, D).transpose(2, 1, 3, 0, 4)
    np.testing.assert_allclose(prefix.pre_caches(), wanted, rtol=1e-4, atol=1e-5)


def test_the_layouts_agree_with_the_families() -> None:
    for architecture in known_architectures():
        family = find_family({"architectures": [architecture]})
        rule = find_past_rule(family.model_type)
        if rule is not None:
            assert rule.layout == family.past_layout


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (
            {"model_type": "bloom", "n_layer": 3, "n_head": 4, "hidden_size": 32},
            (3, 32, 4, 4, 8, None),
        ),
        (
            {
                "model_type": "chatglm_v2",
                "num_layers": 3,
                "num_attention_heads": 4,
                "multi_query_group_num": 2,
                "kv_channels": 16,
                "hidden_size": 32,
                "max_sequence_length": 77,
            },
            (3, 32, 4, 2, 16, 77),
        ),
        (
            {
                "model_type": "llama",
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "hidden_size": 32,
                "vocab_size": 7,
                "max_position_embeddings": 10,
                "rope_scaling_type": "linear",
                "rope_scaling_factor": 4.0,
            },
            (3, 32, 4, 2, 8, 40),
        ),
        (
            {
                "model_type": "qwen2",
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "hidden_size": 32,
                "max_position_embeddings": 10,
                "rope_scaling": {"type": "yarn"},
            },
            (3, 32, 4, 4, 8, None),
        ),
        ({}, (None, None, None, None, None, None)),
    ],
)
def test_sizes_from_a_configuration(config: dict, wanted: tuple) -> None:
    dims = past_dims(config, find_past_rule(config.get("model_type")))
    assert (
        dims.num_layers,
        dims.hidden_size,
        dims.num_heads,
        dims.num_kv_heads,
        dims.head_dim,
        dims.max_positions,
    ) == wanted
