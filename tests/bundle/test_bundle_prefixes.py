"""Files of prefixes: what comes back, and what is refused when they are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from peft_deploy.bundle.prefixes import (
    Prefix,
    check_prefix_tensors,
    read_prefix_file,
    write_prefix_file,
)
from peft_deploy.errors import AdapterError
from peft_deploy.signature import (
    GraphSignature,
    causal_lm_signature,
    past_names,
    prefix_names,
)

BASE, OTHER = "a" * 64, "b" * 64
L, K, P, D = 11, 2, 5, 4  # more layers than ten: names do not sort as numbers do


def signature(**changes: int | str) -> GraphSignature:
    sizes = {"num_layers": L, "num_kv_heads": K, "head_dim": D, "vocab_size": 13}
    return causal_lm_signature(**{**sizes, **changes})


def rows(length: int = P, dtype: str = "float32", layers: int = L) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {
        name: rng.standard_normal((1, K, length, D)).astype(dtype) for name in past_names(layers)
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "poet.safetensors"
    write_prefix_file(path, Prefix("poet", rows(), P), BASE)
    return path


def test_a_prefix_comes_back_as_it_was_in_the_order_of_the_graph(file: Path) -> None:
    prefix = read_prefix_file(file, signature(), BASE, P + 1)
    assert (prefix.name, prefix.num_tokens, prefix.position_offset) == ("poet", P, P)
    assert list(prefix.past) == past_names(L)
    for name, array in rows().items():
        np.testing.assert_array_equal(prefix.past[name], array)


def test_other_tools_read_the_file(file: Path) -> None:
    tensors = load_file(file)
    assert set(tensors) == set(past_names(L))
    assert tensors["past_key_values.10.value"].shape == (1, K, P, D)


def test_slots_carry_the_same_tensors_and_the_offset() -> None:
    prefix = Prefix("poet", rows(), 0)
    slots = prefix.slots(positions=True)
    assert list(slots)[:-1] == prefix_names(L)
    np.testing.assert_array_equal(slots["prefix.10.key"], prefix.past["past_key_values.10.key"])
    assert slots["prefix.position_offset"].tolist() == [0]
    assert "prefix.position_offset" not in prefix.slots(positions=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": L - 1}, "has 11 layers, the graph 10"),
        ({"num_kv_heads": 3}, "does not fit the graph"),
        (
            {"head_dim": 6},
            r"float32 \[1, 2, 5, 4\], the graph takes float32 \[1, 2, 'length', 6\]",
        ),
    ],
)
def test_a_prefix_of_another_model_is_refused(
    changes: dict[str, int | str], message: str, file: Path
) -> None:
    with pytest.raises(AdapterError, match=message):
        read_prefix_file(file, signature(**changes), BASE)


def test_another_base_is_refused(file: Path) -> None:
    with pytest.raises(
        AdapterError, match=f"fingerprint {BASE[:12]}; the bundle's has {OTHER[:12]}"
    ):
        read_prefix_file(file, signature(), OTHER)


def test_a_prefix_that_leaves_no_room_is_refused(file: Path) -> None:
    with pytest.raises(AdapterError, match="has 5 tokens, which leaves no room"):
        read_prefix_file(file, signature(), BASE, P)


@pytest.mark.parametrize("at", [-1, -40, -200])
def test_a_changed_byte_is_noticed(at: int, file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    with pytest.raises(AdapterError, match="is damaged: its values have the fingerprint"):
        read_prefix_file(file, signature(), BASE)


def test_a_file_cut_short_is_refused(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(AdapterError, match="cut short"):
        read_prefix_file(file, signature(), BASE)


def test_other_safetensors_files_and_missing_ones_are_refused(tmp_path: Path) -> None:
    save_file(rows(), tmp_path / "plain.safetensors")
    with pytest.raises(AdapterError, match="is not a bundle's prefix"):
        read_prefix_file(tmp_path / "plain.safetensors", signature(), BASE)
    with pytest.raises(AdapterError, match="there is no prefix at"):
        read_prefix_file(tmp_path / "none.safetensors", signature(), BASE)


def test_values_and_lengths_are_looked_at(tmp_path: Path) -> None:
    infinite = rows()
    infinite["past_key_values.3.key"][0, 1, 2, 3] = np.inf
    uneven = {**rows(), "past_key_values.3.key": rows(P + 1)["past_key_values.3.key"]}
    for past, message in ((infinite, "NaN or infinity"), (uneven, "5, 6 tokens")):
        write_prefix_file(tmp_path / "bad.safetensors", Prefix("bad", past), BASE)
        with pytest.raises(AdapterError, match=message):
            read_prefix_file(tmp_path / "bad.safetensors", signature(), BASE)


def test_an_offset_that_no_library_uses_is_refused(tmp_path: Path) -> None:
    write_prefix_file(tmp_path / "odd.safetensors", Prefix("odd", rows(), 3), BASE)
    with pytest.raises(AdapterError, match="moves positions by 3"):
        read_prefix_file(tmp_path / "odd.safetensors", signature(), BASE)


def _tensors(**changes: np.ndarray) -> dict[str, np.ndarray]:
    return {**Prefix("poet", rows()).slots(positions=True), **changes}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({n: a for n, a in _tensors().items() if n != "prefix.7.value"}, "some layers only"),
        (_tensors(**{"prefix.2.key": np.zeros((1, K, P + 2, D), np.float32)}), "5, 7 tokens"),
        ({"prefix.position_offset": np.array([5])}, "holds no prefix"),
    ],
)
def test_half_a_prefix_in_an_adapter_file_is_refused(
    tensors: dict[str, np.ndarray], message: str
) -> None:
    slots = set(_tensors()) | {"model.layers.0.mlp.up_proj.lora_A.weight"}
    with pytest.raises(AdapterError, match=message):
        check_prefix_tensors(tensors, slots, "poet.onnx_adapter")


def test_a_whole_prefix_or_none_passes_and_must_leave_room() -> None:
    slots = set(_tensors()) | {"lora"}
    check_prefix_tensors(_tensors(), slots, "poet", P + 1)
    check_prefix_tensors({"lora": np.zeros((2, 2))}, slots, "poet", P + 1)
    with pytest.raises(AdapterError, match="leaves no room"):
        check_prefix_tensors(_tensors(), slots, "poet", P)
