"""Single adapters stacked for the slots of a bank."""

from __future__ import annotations

import numpy as np

from peft_deploy.bundle.adapter_bank import (
    adapter_slots,
    bank_capacity,
    is_bank_slot,
    single_name,
    stack_adapters,
)
from peft_deploy.bundle.slots import Slot

SLOTS = {
    slot.name: slot
    for slot in (
        Slot("m.q.lora_A.bank", "float16", ("adapters", 4, "m.q.rank")),
        Slot("m.q.lora_B.bank", "float16", ("adapters", "m.q.rank", 3)),
        Slot("m.k.lora_A.bank", "float16", ("adapters", 4, "m.k.rank")),
        Slot("m.k.lora_B.bank", "float16", ("adapters", "m.k.rank", 3)),
        Slot("prefix.0.key", "float32", (1, 2, "prefix", 8)),
    )
}


def draw(module: str, rank: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        f"{module}.lora_A.weight": rng.normal(size=(4, rank)).astype(np.float16),
        f"{module}.lora_B.weight": rng.normal(size=(rank, 3)).astype(np.float16),
    }


def test_ranks_are_filled_up_and_other_layers_are_zeros() -> None:
    first, second, third = draw("m.q", 2, 1), draw("m.q", 5, 2), draw("m.k", 1, 3)
    stacked = stack_adapters(SLOTS, [first, second | third, {}])
    assert {name: array.shape for name, array in stacked.items()} == {
        "m.q.lora_A.bank": (4, 4, 5),
        "m.q.lora_B.bank": (4, 5, 3),
        "m.k.lora_A.bank": (4, 4, 1),
        "m.k.lora_B.bank": (4, 1, 3),
    }
    assert {array.dtype.name for array in stacked.values()} == {"float16"}
    A, B = stacked["m.q.lora_A.bank"], stacked["m.q.lora_B.bank"]
    for entry, tensors in ((1, first), (2, second)):
        want = tensors["m.q.lora_A.weight"] @ tensors["m.q.lora_B.weight"]
        np.testing.assert_allclose(A[entry] @ B[entry], want, atol=5e-3)
    np.testing.assert_array_equal(A[1, :, :2], first["m.q.lora_A.weight"])
    np.testing.assert_array_equal(stacked["m.k.lora_B.bank"][2], third["m.k.lora_B.weight"])
    empty = [A[[0, 3]], A[1, :, 2:], B[1, 2:], stacked["m.k.lora_A.bank"][[0, 1, 3]]]
    assert not any(array.any() for array in empty)


JOINT = {
    slot.name: slot
    for slot in (
        Slot("m.q+k.lora_A.bank", "float32", ("adapters", 4, "m.q+k.rank")),
        Slot("m.q+k.lora_A.ranks", "int64", (2,)),
        Slot("m.q.lora_B.bank", "float32", ("adapters", "m.q.rank", 3)),
        Slot("m.k.lora_B.bank", "float32", ("adapters", "m.k.rank", 3)),
    )
}


def test_layers_that_share_an_a() -> None:
    """Each has as many columns as its widest adapter needs, whichever adapter that is."""
    rng = np.random.default_rng(6)

    def adapter(q: int, k: int) -> dict[str, np.ndarray]:
        shapes = {"q+k.lora_A": (4, q + k), "q.lora_B": (q, 3), "k.lora_B": (k, 3)}
        tensors = {f"m.{n}.weight": rng.normal(size=s).astype("f") for n, s in shapes.items()}
        return tensors | {"m.q+k.lora_A.ranks": np.array([q, k])}

    adapters = [adapter(2, 1), adapter(1, 4), {}]
    stacked = stack_adapters(JOINT, adapters)
    assert {name: array.shape for name, array in stacked.items()} == {
        "m.q+k.lora_A.bank": (4, 4, 6),
        "m.q+k.lora_A.ranks": (2,),
        "m.q.lora_B.bank": (4, 2, 3),
        "m.k.lora_B.bank": (4, 4, 3),
    }
    assert stacked["m.q+k.lora_A.ranks"].tolist() == [2, 4]
    A, B = stacked["m.q+k.lora_A.bank"], [stacked[f"m.{part}.lora_B.bank"] for part in "qk"]
    for entry, own in enumerate([{}, *adapters]):
        q = own["m.q+k.lora_A.ranks"][0] if own else 0
        for part, mine, theirs in (
            ("q", A[entry, :, :2] @ B[0][entry], slice(None, q)),
            ("k", A[entry, :, 2:] @ B[1][entry], slice(q, None)),
        ):
            a, b = own.get("m.q+k.lora_A.weight"), own.get(f"m.{part}.lora_B.weight")
            wanted = np.zeros((4, 3)) if a is None or b is None else a[:, theirs] @ b
            np.testing.assert_allclose(mine, wanted, atol=1e-6)
    assert adapter_slots(JOINT)["m.q+k.lora_A.ranks"] is JOINT["m.q+k.lora_A.ranks"]


def test_no_adapter_at_all_is_one_empty_entry() -> None:
    stacked = stack_adapters(SLOTS, [])
    assert stacked["m.q.lora_A.bank"].shape == (1, 4, 0)
    assert stacked["m.q.lora_B.bank"].shape == (1, 0, 3)


def test_names_and_slots_of_one_adapter() -> None:
    assert single_name("m.q.lora_B.bank") == "m.q.lora_B.weight"
    assert single_name("prefix.0.key") == "prefix.0.key"
    assert [is_bank_slot(name) for name in ("m.q.lora_A.bank", "m.q.lora_A.weight")] == [
        True,
        False,
    ]
    single = adapter_slots(SLOTS)
    assert next(iter(single)) == "m.q.lora_A.weight" and "prefix.0.key" in single
    assert str(single["m.q.lora_A.weight"]) == "float16 [4, m.q.rank]"
    assert all(single[name].takes(array) for name, array in draw("m.k", 7, 1).items())
    assert single["prefix.0.key"] is SLOTS["prefix.0.key"]


def test_capacity() -> None:
    assert bank_capacity({"adapter_bank": {"capacity": 5, "file": "x"}}) == 5
    assert bank_capacity({"lora_slots": {}}) is None
