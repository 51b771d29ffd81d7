"""One A for layers that read the same input: put together, taken apart, and refused where it does not add up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_deploy.adapters.formats.joint_lora import join, separate
from peft_deploy.errors import AdapterError
from peft_deploy.signature import joint_module, modules_of

IN, OUT = 5, 3
JOINT = "layers.0.attn.q+k+v"
OPEN = [
    f"{JOINT}.lora_A.weight",
    f"{JOINT}.lora_A.ranks",
    *(f"layers.0.attn.{part}.lora_B.weight" for part in "qkv"),
    "layers.0.attn.o.lora_A.weight",
    "layers.0.attn.o.lora_B.weight",
]
FIXED = [name for name in OPEN if not name.endswith("ranks")]
Arrays = dict[str, np.ndarray]


def drawn(ranks: dict[str, int], seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    tensors = {}
    for part, rank in ranks.items():
        A, B = rng.normal(size=(IN, rank)), rng.normal(size=(rank, OUT))
        tensors[f"layers.0.attn.{part}.lora_A.weight"] = A.astype(np.float32)
        tensors[f"layers.0.attn.{part}.lora_B.weight"] = B.astype(np.float32)
    return tensors


def same(found: Arrays, wanted: Arrays) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@given(st.dictionaries(st.sampled_from("qkvo"), st.integers(1, 6)), st.integers(0, 99))
def test_any_ranks_come_back(ranks: dict[str, int], seed: int) -> None:
    tensors = drawn(ranks, seed)
    together = join(tensors, OPEN, "here")
    assert set(together) <= set(OPEN)
    same(separate(together, "here"), tensors)
    again = join(separate(together, "here"), OPEN, "here")
    same(again, together)
    if set(ranks) & set("qkv"):
        widths = [ranks.get(part, 0) for part in "qkv"]
        assert together[f"{JOINT}.lora_A.ranks"].tolist() == widths
        assert together[f"{JOINT}.lora_A.weight"].shape == (IN, sum(widths))


@given(st.sets(st.sampled_from("qkv"), min_size=1), st.integers(1, 4))
def test_one_rank_for_all_needs_no_ranks(parts: set[str], rank: int) -> None:
    tensors = drawn(dict.fromkeys(sorted(parts), rank))
    together = join(tensors, FIXED, "here")
    assert together[f"{JOINT}.lora_A.weight"].shape == (IN, 3 * rank)
    same(separate(together, "here"), tensors)


def test_an_a_that_nobody_joins_stays() -> None:
    tensors = drawn({"q": 2, "o": 3})
    same(join(tensors, ["layers.0.attn.q.lora_A.weight"], "here"), tensors)
    same(separate(tensors, "here"), tensors)


def test_an_adapter_of_zeros_keeps_its_a() -> None:
    """Its B would otherwise meet no columns at all."""
    tensors = drawn({"q": 2, "k": 1})
    tensors["layers.0.attn.k.lora_A.weight"][:] = 0
    same(separate(join(tensors, OPEN, "here"), "here"), tensors)


A = np.ones((IN, 4), np.float32)
BAD = [
    ({f"{JOINT}.lora_A.weight": A}, r"is \[5, 4\]; its columns should be the ranks of 3 layers"),
    (
        {f"{JOINT}.lora_A.weight": A, f"{JOINT}.lora_A.ranks": np.array([2, 2, 1])},
        r"is \[5, 4\], the ranks \[2, 2, 1\]",
    ),
    (
        {f"{JOINT}.lora_A.weight": A, f"{JOINT}.lora_A.ranks": np.array([5, -2, 1])},
        r"the ranks \[5, -2, 1\]",
    ),
    ({f"{JOINT}.lora_A.weight": A, f"{JOINT}.lora_A.ranks": np.array([2, 2])}, "of 3 layers"),
    ({f"{JOINT}.lora_A.weight": A[0], f"{JOINT}.lora_A.ranks": np.array([2, 1, 1])}, "of 3"),
    (
        {f"{JOINT}.lora_A.weight": A, f"{JOINT}.lora_A.ranks": np.array([2**63 - 1] * 2 + [6])},
        "of 3 layers",  # their sum wraps around to 4 in 64 bits
    ),
    ({f"{JOINT}.lora_A.ranks": np.array([0, 0, 0])}, "no lora_A of several layers beside it"),
    (
        {"layers.0.attn.o.lora_A.weight": A, "layers.0.attn.o.lora_A.ranks": np.array([4])},
        "no lora_A of several layers beside it",
    ),
    (
        {f"{JOINT}.lora_A.weight": A[:, :3], "layers.0.attn.k.lora_A.weight": A},
        r"more than one lora_A of layers\.0\.attn\.k\.",
    ),
    (
        {f"{JOINT}.lora_A.weight": A[:, :3], "layers.0.attn.q+o.lora_A.weight": A},
        r"more than one lora_A of layers\.0\.attn\.q\.",
    ),
    ({"layers.0.attn.q+q.lora_A.weight": A}, r"more than one lora_A of layers\.0\.attn\.q\."),
]


@pytest.mark.parametrize(("tensors", "message"), BAD)
def test_columns_that_do_not_add_up(tensors: Arrays, message: str) -> None:
    with pytest.raises(AdapterError, match=message) as caught:
        separate(tensors, "a.onnx_adapter")
    assert str(caught.value).startswith("a.onnx_adapter")


@pytest.mark.parametrize(
    ("shape", "dtype", "slots", "others"),
    [
        ((IN + 1, 2), "float32", OPEN, "q"),
        ((IN, 2), "float16", OPEN, "q"),
        ((IN, 3), "float32", FIXED, "q"),
        ((IN,), "float32", OPEN, "q"),
        ((IN,), "float32", FIXED, "q"),
        ((IN,), "float32", FIXED, ""),
        ((), "float32", OPEN, ""),
    ],
)
def test_as_that_do_not_fit_each_other(
    shape: tuple[int, ...], dtype: str, slots: list[str], others: str
) -> None:
    tensors = drawn(dict.fromkeys(others, 2))
    tensors["layers.0.attn.v.lora_A.weight"] = np.ones(shape, dtype)
    with pytest.raises(AdapterError, match="no matrices that fit beside each other: float32"):
        join(tensors, slots, "here")


def test_modules_of_several_parents_have_no_name_together() -> None:
    with pytest.raises(ValueError, match="not of one module"):
        joint_module(["layers.0.attn.q", "layers.1.attn.k"])


@given(
    st.lists(st.text("abz_0", min_size=1), min_size=1, unique=True),
    st.sampled_from(["", "layers.0.", "a.b.c."]),
)
def test_names_say_the_modules(names: list[str], parent: str) -> None:
    modules = [parent + name for name in names]
    assert modules_of(joint_module(modules)) == modules
