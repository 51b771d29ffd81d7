"""PEFT's prefixes: key and value by layer, where PaddleNLP has all keys first."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from peft_deploy.adapters.formats.peft_prefix import (
    read_peft_prefix,
    to_paddle_order,
    to_peft_order,
    write_peft_prefix,
)
from peft_deploy.adapters.formats.prefix import EMBEDDING, read_prefix, write_prefix
from peft_deploy.errors import AdapterError
from peft_deploy.families import ModelDims

L, H, K, D, P = 3, 4, 2, 5, 6
DIMS = ModelDims(
    num_layers=L,
    hidden_size=H * D,
    num_heads=H,
    num_kv_heads=K,
    head_dim=D,
    vocab_size=9,
    max_positions=32,
)


def rows(dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(5).standard_normal((P, 2 * L * K * D)).astype(dtype)


def write(folder: Path, array: np.ndarray | None = None, **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": P,
        "token_dim": K * D,
        "num_transformer_submodules": 1,
        "num_attention_heads": K,
        "num_layers": L,
        "encoder_hidden_size": K * D,
        "prefix_projection": False,
        "inference_mode": True,
        **options,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {"prompt_embeddings": rows() if array is None else array},
        folder / "adapter_model.safetensors",
    )
    return folder


def what_peft_computes(array: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Key and value of each layer, [K, P, D], element by element as PEFT cuts its rows."""
    past = []
    for layer in range(L):
        pair = []
        for half in range(2):
            block = np.empty((K, P, D), array.dtype)
            for k, p, d in np.ndindex(block.shape):
                block[k, p, d] = array[p, ((2 * layer + half) * K + k) * D + d]
            pair.append(block)
        past.append((pair[0], pair[1]))
    return past


def test_every_layer_gets_its_own_keys_and_values(tmp_path: Path) -> None:
    array = rows()
    prefix = read_peft_prefix(write(tmp_path, array), DIMS)
    for (key, value), (wanted_key, wanted_value) in zip(
        prefix.past_key_values(), what_peft_computes(array), strict=True
    ):
        np.testing.assert_array_equal(key[0], wanted_key)
        np.testing.assert_array_equal(value[0], wanted_value)
    assert not np.array_equal(prefix.state[EMBEDDING], array)  # the orders do differ
    assert (prefix.num_kv_heads, prefix.head_dim, prefix.num_tokens) == (K, D, P)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_there_and_back(tmp_path: Path, dtype: Any) -> None:
    array = rows(dtype)
    prefix = read_peft_prefix(write(tmp_path / "a", array), DIMS)
    write_prefix(replace(prefix, path=tmp_path / "b"))
    write_peft_prefix(tmp_path / "c", read_prefix(tmp_path / "b"))
    again = load_file(tmp_path / "c" / "adapter_model.safetensors")
    assert list(again) == ["prompt_embeddings"]
    np.testing.assert_array_equal(again["prompt_embeddings"], array)
    written, original = (
        json.loads((tmp_path / folder / "adapter_config.json").read_text()) for folder in "ca"
    )
    assert {k: written[k] for k in original} == original


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6))
def test_the_orders_are_inverse(layers: int, tokens: int, width: int) -> None:
    array = np.arange(tokens * layers * 2 * width).reshape(tokens, -1)
    np.testing.assert_array_equal(to_peft_order(to_paddle_order(array, layers), layers), array)
    np.testing.assert_array_equal(to_paddle_order(to_peft_order(array, layers), layers), array)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "no PREFIX_TUNING"),
        ({"num_layers": 2}, "num_layers: 2"),
        ({"num_attention_heads": H, "token_dim": H * D}, "heads are not grouped"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules: 2"),
        ({"num_virtual_tokens": 7}, "prompt_embeddings"),
    ],
)
def test_prefixes_of_other_models(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError) as caught:
        read_peft_prefix(write(tmp_path, **options), DIMS)
    assert message in f"{caught.value.message} {caught.value.hint}"


def test_encoders_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a")
    save_file(
        {"embedding.weight": rows(), "transform.0.weight": rows()},
        tmp_path / "a" / "adapter_model.safetensors",
    )
    with pytest.raises(AdapterError, match="an encoder cannot be read"):
        read_peft_prefix(tmp_path / "a", DIMS)


def test_a_projection_is_evaluated_when_written(tmp_path: Path) -> None:
    flat = read_peft_prefix(write(tmp_path / "b"), DIMS)
    rng, width = np.random.default_rng(4), K * D
    shapes = {
        EMBEDDING: (P, width),
        "1.weight": (width, 7),
        "1.bias": (7,),
        "3.weight": (7, 2 * L * width),
        "3.bias": (2 * L * width,),
    }
    state = {name: rng.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}
    config = replace(flat.config, prefix_projection=True, prefix_projection_hidden_size=7)
    projected = replace(flat, state=state, config=config)

    write_peft_prefix(tmp_path / "c", projected)

    written = read_peft_prefix(tmp_path / "c", DIMS)
    assert not written.config.prefix_projection
    np.testing.assert_array_equal(written.pre_caches(), projected.pre_caches())
    # [P, 2, L, K, D] by hand, with PaddleNLP's order of the columns
    hidden = np.tanh(state[EMBEDDING] @ state["1.weight"] + state["1.bias"])
    rows = (hidden @ state["3.weight"] + state["3.bias"]).reshape(P, 2, L, K, D)
    np.testing.assert_allclose(
        written.pre_caches(), rows.transpose(2, 1, 3, 0, 4), rtol=1e-5, atol=1e-6
    )


def test_a_projection_that_was_flattened_is_read(tmp_path: Path) -> None:
    flat = read_peft_prefix(write(tmp_path / "a"), DIMS)
    projected = read_peft_prefix(write(tmp_path / "b", prefix_projection=True), DIMS)
    assert projected.fingerprint == flat.fingerprint
