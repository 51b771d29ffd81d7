"""Faults of adapters: merged wrongly, and wrong in the files beside a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from bundle_edits import Array, GraphEdit
from made_bundles import BEHIND_PREFIX, PREFIX
from mutation_subjects import Subject
from mutations import Break, Mutation, with_subject

from peft_deploy.adapters.formats.joint_lora import join, separate
from peft_deploy.adapters.formats.onnx_file import read_onnx_file, write_onnx_adapter
from peft_deploy.bundle import Manifest
from peft_deploy.bundle.prefixes import prefix_path, write_prefix_file

L0, L1 = "llama.layers.0", "llama.layers.1"
Q0 = "/model/layers.0/self_attn/q_proj/MatMul"
LAST = "model.layers.1"

Delta = Callable[[Subject, str], Array]


def merged_with(delta: Delta, *weights: str) -> Break:
    """Some weights (all that the adapter changes when none are named) get something else added."""

    def edit(subject: Subject, graph: GraphEdit) -> None:
        for name in weights or adapted(subject):
            graph.set_weight(name, subject.base[name] + delta(subject, name))

    return with_subject(edit)


def adapted(subject: Subject) -> list[str]:
    """The weights that the adapter changes."""
    return [n for n, w in subject.merged.items() if not np.array_equal(w, subject.base[n])]


def true_delta(subject: Subject, name: str) -> Array:
    """What the adapter adds to a weight."""
    A, B, scaling = subject.pair(name)
    return scaling * (A @ B)


def times(factor: float) -> Delta:
    return lambda subject, name: factor * true_delta(subject, name)


def of_other_layer(part: str) -> Delta:
    """A, B or both of the other layer's adapter."""

    def delta(subject: Subject, name: str) -> Array:
        own, its = subject.pair(name), subject.pair(renamed(name, "layers.0", "layers.1"))
        A = its[0] if "A" in part else own[0]
        B = its[1] if "B" in part else own[1]
        return own[2] * (A @ B)

    return delta


def both(module: str) -> list[str]:
    return [f"model.layers.{i}.{module}.weight" for i in (0, 1)]


def rank_lost(subject: Subject, name: str) -> Array:
    A, B, scaling = subject.pair(name)
    return scaling * (A[:, :-1] @ B[:-1])


def ranks_reversed(subject: Subject, name: str) -> Array:
    A, B, scaling = subject.pair(name)
    return scaling * (A[:, ::-1] @ B)


O1, V1 = f"{LAST}.self_attn.o_proj.weight", f"{LAST}.self_attn.v_proj.weight"
ATTENTION1 = "/model/layers.1/self_attn"

ADAPTER_MUTATIONS = [
    Mutation("adapter left out", "llama", merged_with(times(0)), Q0, L0),
    Mutation("adapter scaled by 1.01", "llama", merged_with(times(1.01)), Q0, L0),
    Mutation("adapter without its scaling", "llama", merged_with(times(0.5)), Q0, L0),
    Mutation("adapter merged twice", "llama", merged_with(times(2)), Q0, L0),
    Mutation("adapter subtracted", "llama", merged_with(times(-1)), Q0, L0),
    Mutation(
        "adapter of one weight left out",
        "llama",
        merged_with(times(0), V1),
        f"{ATTENTION1}/v_proj/MatMul",
        L1,
    ),
    Mutation(
        "adapter's product transposed in one weight",
        "llama",
        merged_with(lambda s, n: true_delta(s, n).T, O1),
        f"{ATTENTION1}/o_proj/MatMul",
        L1,
    ),
    Mutation(
        "A and B of two layers swapped",
        "llama",
        merged_with(of_other_layer("AB"), *both("mlp.up_proj")),
        "/model/layers.0/mlp/up_proj/MatMul",
        L0,
    ),
    Mutation(
        "B of two layers swapped",
        "llama",
        merged_with(of_other_layer("B"), *both("self_attn.k_proj")),
        "/model/layers.0/self_attn/k_proj/MatMul",
        L0,
    ),
    Mutation(
        "last rank of an adapter lost in one weight",
        "llama",
        merged_with(rank_lost, f"{LAST}.mlp.down_proj.weight"),
        "/model/layers.1/mlp/down_proj/MatMul",
        L1,
    ),
    Mutation(
        "A and B joined in another order of ranks",
        "llama",
        merged_with(ranks_reversed, f"{LAST}.mlp.gate_proj.weight"),
        "/model/layers.1/mlp/gate_proj/MatMul",
        L1,
    ),
]


def in_prefix(change: Callable[[Mapping[str, Array]], Mapping[str, Array]]) -> Break:
    """The prefix's file is written anew, with other keys and values."""

    def apply(subject: Subject, folder: Path) -> None:
        prefix = subject.prefix(folder)
        changed = dict(change(prefix.past))
        assert any(not np.array_equal(v, changed[n]) for n, v in prefix.past.items())
        _write(folder, replace(prefix, past=changed))

    return apply


def moved_by_prefix(subject: Subject, folder: Path) -> None:
    prefix = subject.prefix(folder)
    assert prefix.position_offset == 0
    _write(folder, replace(prefix, position_offset=prefix.num_tokens))


def _write(folder: Path, prefix: object) -> None:
    fingerprint = Manifest.read(folder).base["fingerprint"]
    write_prefix_file(prefix_path(folder, PREFIX), prefix, fingerprint)  # type: ignore[arg-type]


def swapped_in(past: Mapping[str, Array], one: str, other: str) -> dict[str, Array]:
    """Names with ``one`` and ``other`` in them get each other's arrays."""
    return {n: past[renamed(n, one, other)] for n in past}


def renamed(name: str, one: str, other: str) -> str:
    """The same name with the two exchanged in it."""
    return name.replace(one, "#").replace(other, one).replace("#", other)


def each(change: Callable[[Array], Array]) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    return lambda past: {
        n: np.ascontiguousarray(change(a)).astype(a.dtype) for n, a in past.items()
    }


def one_layer(change: Callable[[Array], Array], *names: str) -> Callable[..., dict[str, Array]]:
    return lambda past: {**past, **each(change)({n: past[n] for n in names})}


KEY1, VALUE1 = "past_key_values.1.key", "past_key_values.1.value"


def in_adapter(change: Callable[[dict[str, Array]], dict[str, Array]]) -> Break:
    """The adapter's file is written anew, with other tensors."""

    def apply(subject: Subject, folder: Path) -> None:
        path = subject.adapter_file(folder)
        file = read_onnx_file(path)
        tensors = {n: np.array(a) for n, a in file.tensors.items()}
        changed = {n: np.ascontiguousarray(a) for n, a in change(dict(tensors)).items()}
        same = changed.keys() == tensors.keys() and all(
            np.array_equal(a, changed[n]) for n, a in tensors.items()
        )
        assert not same
        write_onnx_adapter(path, changed, file.model_version)

    return apply


def scaled_B(factor: float) -> Callable[[dict[str, Array]], dict[str, Array]]:
    return lambda tensors: {
        n: (factor * a).astype(a.dtype) if ".lora_B" in n else a for n, a in tensors.items()
    }


def without(part: str) -> Callable[[dict[str, Array]], dict[str, Array]]:
    return lambda tensors: {n: a for n, a in tensors.items() if part not in n}


def exchanged(part: str, one: str, other: str) -> Callable[..., dict[str, Array]]:
    """Tensors with ``part`` in their names change places between two modules."""

    def change(tensors: dict[str, Array]) -> dict[str, Array]:
        chosen = {n: a for n, a in tensors.items() if part in n and (one in n or other in n)}
        assert len(chosen) == 2, sorted(tensors)
        return {**tensors, **swapped_in(chosen, one, other)}

    return change


def only(tensors: dict[str, Array], part: str) -> dict[str, Array]:
    return {n: a for n, a in tensors.items() if part in n}


def shortened(module: str) -> Callable[..., dict[str, Array]]:
    """One rank fewer in a module."""

    def change(tensors: dict[str, Array]) -> dict[str, Array]:
        own = separate(tensors, "file")
        A, B = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        return join({**own, A: own[A][:, :-1], B: own[B][:-1]}, tensors, "file")

    return change


def turned(part: str) -> Callable[..., dict[str, Array]]:
    """The As of layers that share one stand in another order."""

    def change(tensors: dict[str, Array]) -> dict[str, Array]:
        (name,) = (n for n in tensors if part in n and "+" in n and n.endswith("lora_A.weight"))
        ranks = tensors[name.replace(".weight", ".ranks")]
        return {**tensors, name: np.roll(tensors[name], ranks[0], axis=1)}

    return change


AT_RUN_TIME = "llama, LoRA at run time"
# Of the layers that are packed, the last one's branch comes first in the graph, and so is the first to be found.
FILE_MUTATIONS = [
    Mutation(
        "prefix: key and value swapped",
        BEHIND_PREFIX,
        in_prefix(lambda past: swapped_in(past, ".key", ".value")),
        layer=L0,
        file="past_key_values.0.value",
    ),
    Mutation(
        "prefix: two layers swapped",
        BEHIND_PREFIX,
        in_prefix(lambda p: swapped_in(p, "0", "1")),
        layer=L0,
        file="past_key_values.0.key",
    ),
    Mutation(
        "prefix: tokens in reverse in one layer's values",
        BEHIND_PREFIX,
        in_prefix(one_layer(lambda a: a[:, :, ::-1], VALUE1)),
        layer=L1,
        file=VALUE1,
    ),
    Mutation(
        "prefix: last token missing",
        BEHIND_PREFIX,
        in_prefix(each(lambda a: a[:, :, :-1])),
        layer=L0,
        file="past_key_values.0.key",
    ),
    Mutation(
        "prefix: one layer scaled by 1.01",
        BEHIND_PREFIX,
        in_prefix(one_layer(lambda a: 1.01 * a, KEY1)),
        layer=L1,
        file=KEY1,
    ),
    Mutation(
        "prefix: heads of one layer swapped",
        BEHIND_PREFIX,
        in_prefix(one_layer(lambda a: a[:, ::-1], KEY1, VALUE1)),
        layer=L1,
        file=VALUE1,
    ),
    Mutation(
        "prefix: rounded to half precision",
        BEHIND_PREFIX,
        in_prefix(each(lambda a: a.astype(np.float16))),
        layer=L0,
        file="past_key_values.0.key",
    ),
    Mutation("prefix: positions moved by its length", BEHIND_PREFIX, moved_by_prefix),
    Mutation(
        "adapter file: scaling not in B",
        AT_RUN_TIME,
        in_adapter(scaled_B(0.5)),
        layer=L0,
        file="model.layers.0.self_attn.v_proj.lora_B.weight",
    ),
    Mutation(
        "adapter file: scaled by 1.01",
        AT_RUN_TIME,
        in_adapter(scaled_B(1.01)),
        layer=L0,
        file="model.layers.0.self_attn.v_proj.lora_B.weight",
    ),
    Mutation(
        "adapter file: one layer missing",
        AT_RUN_TIME,
        in_adapter(without("layers.1.")),
        layer=L1,
        file="model.layers.1.self_attn.v_proj.lora_B.weight",
    ),
    Mutation(
        "adapter file: A of two layers swapped",
        AT_RUN_TIME,
        in_adapter(exchanged("v_proj.lora_A.weight", "layers.0", "layers.1")),
        layer=L0,
        file="model.layers.0.self_attn.q_proj+k_proj+v_proj.lora_A.weight",
    ),
    Mutation(
        "adapter file: B of gate and up swapped in one layer",
        AT_RUN_TIME,
        in_adapter(
            lambda t: {**t, **exchanged("lora_B", "gate_proj", "up_proj")(only(t, "layers.1"))}
        ),
        layer=L1,
        file="model.layers.1.mlp.up_proj.lora_B.weight",
    ),
    Mutation(
        "adapter file: last rank lost in one layer",
        AT_RUN_TIME,
        in_adapter(shortened("model.layers.1.self_attn.q_proj")),
        layer=L1,
        file="model.layers.1.self_attn.q_proj.lora_B.weight",
    ),
    Mutation(
        "adapter file: As of layers that share one in another order",
        AT_RUN_TIME,
        in_adapter(turned("layers.1.self_attn")),
        layer=L1,
        file="model.layers.1.self_attn.q_proj+k_proj+v_proj.lora_A.weight",
    ),
]
