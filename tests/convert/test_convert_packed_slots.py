"""Slots on layers that read the same input, packed into one matrix or not: one A for all, ranks of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import helper
from small_graphs import build_graph, random_weights

from peft_deploy.convert.adapter_bank import AddAdapterBankPass
from peft_deploy.convert.linears import Groups, find_linears
from peft_deploy.convert.lora_slots import AddLoraSlotsPass
from peft_deploy.convert.postflight import check_graph
from peft_deploy.convert.weight_file import WeightFile
from peft_deploy.signature import GraphSignature, TensorSpec

SIZES = {"q": 4, "k": 2, "v": 3}
GROUPS = {"layers.0.qkv": [f"layers.0.{part}" for part in SIZES]}
SIGNATURE = GraphSignature(
    (TensorSpec("x", "float32", ("batch", "sequence", 6)),),
    (TensorSpec("y", "float32", ("batch", "sequence", 5)),),
)
Arrays = dict[str, np.ndarray]


@pytest.fixture
def weights() -> Arrays:
    shapes = {
        "layers.0.qkv.weight": (6, 9),
        "layers.0.qkv.bias": (9,),
        "layers.0.out.weight": (9, 5),
    }
    return random_weights(shapes)


@pytest.fixture
def model(weights: Arrays) -> ir.Model:
    """y = out(v k q), whose parts come from one product."""
    sizes = np.array(list(SIZES.values()), np.int64)
    nodes = [
        helper.make_node("MatMul", ["x", "layers.0.qkv.weight"], ["a"]),
        helper.make_node("Add", ["a", "layers.0.qkv.bias"], ["b"]),
        helper.make_node("Split", ["b", "sizes"], ["q", "k", "v"], axis=-1),
        helper.make_node("Concat", ["v", "k", "q"], ["c"], axis=-1),
        helper.make_node("MatMul", ["c", "layers.0.out.weight"], ["y"]),
    ]
    return build_graph(nodes, {"sizes": sizes, **weights}, ["batch", "sequence", 5])


@pytest.fixture
def plain_model(weights: Arrays) -> ir.Model:
    """The same with a product for each part."""
    columns = np.split(weights["layers.0.qkv.weight"], [4, 6], axis=1)
    biases = np.split(weights["layers.0.qkv.bias"], [4, 6])
    nodes, own = [], {"layers.0.out.weight": weights["layers.0.out.weight"]}
    for part, W, bias in zip(SIZES, columns, biases, strict=True):
        own |= {f"layers.0.{part}.weight": W, f"layers.0.{part}.bias": bias}
        nodes += [
            helper.make_node("MatMul", ["x", f"layers.0.{part}.weight"], [f"{part}.a"]),
            helper.make_node("Add", [f"{part}.a", f"layers.0.{part}.bias"], [part]),
        ]
    nodes += [
        helper.make_node("Concat", ["v", "k", "q"], ["c"], axis=-1),
        helper.make_node("MatMul", ["c", "layers.0.out.weight"], ["y"]),
    ]
    return build_graph(nodes, own, ["batch", "sequence", 5])


def expected(w: Arrays, x: np.ndarray, change: Arrays) -> np.ndarray:
    parts = np.split(x @ w["layers.0.qkv.weight"] + w["layers.0.qkv.bias"], [4, 6], -1)
    for i, part in enumerate(SIZES):
        A = change.get(f"layers.0.{part}.lora_A.weight")
        if A is not None:
            parts[i] = parts[i] + x @ A @ change[f"layers.0.{part}.lora_B.weight"]
    return np.concatenate(parts[::-1], -1) @ w["layers.0.out.weight"]


def run(model: ir.Model, feeds: Arrays) -> np.ndarray:
    data = ir.to_proto(model).SerializeToString()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, feeds)
    return np.asarray(result)


def drawn(modules: list[str], ranks: list[int]) -> Arrays:
    rng = np.random.default_rng(4)
    change = {}
    for module, rank in zip(modules, ranks, strict=True):
        out = SIZES[module.rpartition(".")[2]]
        change[f"{module}.lora_A.weight"] = rng.normal(size=(6, rank)).astype(np.float32)
        change[f"{module}.lora_B.weight"] = rng.normal(size=(rank, out)).astype(np.float32)
    return change


def test_the_layers_are_the_parts(model: ir.Model) -> None:
    found = find_linears(model.graph, GROUPS)
    assert list(found) == ["layers.0.q", "layers.0.k", "layers.0.v", "layers.0.out"]
    assert [linear.shape for linear in found.values()] == [(6, 4), (6, 2), (6, 3), (9, 5)]
    assert [linear.result.name for linear in found.values()] == ["q", "k", "v", "y"]


def test_a_split_that_is_gone_leaves_no_layers(model: ir.Model) -> None:
    """A fusion may take the packed result as a whole: then nobody may think that there are slots."""
    assert list(find_linears(model.graph, {"layers.0.qkv": ["layers.0.q", "layers.0.k"]})) == [
        "layers.0.out"
    ]


def joint(change: Arrays, parts: str = "qkv", entries: int | None = None) -> Arrays:
    """The same with one A; for a bank with an entry of zeros in front, and under a bank's names."""
    end = "weight" if entries is None else "bank"
    modules = [f"layers.0.{part}" for part in parts]
    name = "layers.0." + "+".join(parts)
    As = [change.get(f"{m}.lora_A.weight", np.zeros((6, 0), np.float32)) for m in modules]
    given = {f"{name}.lora_A.weight": np.concatenate(As, axis=1)}
    given |= {n: a for n, a in change.items() if "lora_B" in n}
    if entries is not None:
        given = {
            n.replace(".weight", ".bank"): np.stack([np.zeros_like(a), *[a] * entries])
            for n, a in given.items()
        }
    assert all(n.endswith(end) for n in given)
    return given | {f"{name}.lora_A.ranks": np.array([A.shape[1] for A in As])}


@pytest.mark.parametrize("graph", ["model", "plain_model"])
def test_parts_have_ranks_of_their_own(
    graph: str, weights: Arrays, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """An adapter is the same for packed and plain graphs."""
    model = request.getfixturevalue(graph)
    x = np.random.default_rng(2).normal(size=(2, 3, 6)).astype(np.float32)
    plain = run(model, {"x": x})
    with WeightFile(tmp_path / "w") as file:
        step = AddLoraSlotsPass(lambda found: found[:3], file, groups=GROUPS)
        step(model)
    assert step.added is not None
    assert list(step.added.modules) == GROUPS["layers.0.qkv"]
    assert list(step.added.names) == [
        "layers.0.q+k+v.lora_A.weight",
        "layers.0.q+k+v.lora_A.ranks",
        *(f"layers.0.{part}.lora_B.weight" for part in "qkv"),
    ]
    check_graph(model, SIGNATURE, 17, step.added.names)
    np.testing.assert_array_equal(run(model, {"x": x}), plain)  # to the bit
    for modules, ranks in ((["q", "k", "v"], [1, 7, 3]), (["v"], [2]), (["q", "k"], [5, 5])):
        change = drawn([f"layers.0.{m}" for m in modules], ranks)
        result = run(model, {"x": x, **joint(change)})
        np.testing.assert_allclose(result, expected(weights, x, change), rtol=1e-4, atol=1e-4)
        assert np.abs(result - plain).max() > 0.1


def test_one_product_for_all_as(model: ir.Model, tmp_path: Path) -> None:
    with WeightFile(tmp_path / "w") as file:
        AddLoraSlotsPass(lambda found: found, file, groups=GROUPS)(model)
    product, cut = (
        node for node in model.graph if (node.name or "").startswith("/layers.0/q+k+v/")
    )
    assert (product.op_type, cut.op_type) == ("MatMul", "Split")
    assert [value.name for value in product.inputs] == ["x", "layers.0.q+k+v.lora_A.weight"]
    assert cut.inputs[1].name == "layers.0.q+k+v.lora_A.ranks"
    assert sum(node.op_type == "MatMul" for node in model.graph) == 2 + 1 + 3 + 2


def test_layers_without_slots_are_left_out_of_the_a(
    model: ir.Model, weights: Arrays, tmp_path: Path
) -> None:
    x = np.random.default_rng(5).normal(size=(1, 4, 6)).astype(np.float32)
    with WeightFile(tmp_path / "w") as file:
        AddLoraSlotsPass(lambda found: [found[0], found[2]], file, groups=GROUPS)(model)
    change = drawn(["layers.0.q", "layers.0.v"], [3, 2])
    result = run(model, {"x": x, **joint(change, "qv")})
    np.testing.assert_allclose(result, expected(weights, x, change), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("graph", ["model", "plain_model"])
def test_the_order_in_which_layers_are_chosen_does_not_matter(
    graph: str, weights: Arrays, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(graph)
    x = np.random.default_rng(7).normal(size=(1, 4, 6)).astype(np.float32)
    with WeightFile(tmp_path / "w") as file:
        AddLoraSlotsPass(lambda found: [found[2], found[0], found[1]], file, groups=GROUPS)(model)
    seen = set(model.graph.inputs) | set(model.graph.initializers.values())
    for node in model.graph:
        assert seen.issuperset(value for value in node.inputs if value is not None), node.name
        seen |= set(node.outputs)
    change = drawn(GROUPS["layers.0.qkv"], [3, 2, 1])
    result = run(model, {"x": x, **joint(change)})
    np.testing.assert_allclose(result, expected(weights, x, change), rtol=1e-4, atol=1e-4)


def names_of_As(model: ir.Model, folder: Path, groups: Groups = GROUPS) -> list[str]:
    """Of the first three layers."""
    with WeightFile(folder / "w") as file:
        step = AddLoraSlotsPass(lambda found: found[:3], file, groups=groups)
        step(model)
    assert step.added is not None
    return [name for name in step.added.names if name.endswith("lora_A.weight")]


def test_layers_of_several_parents_keep_their_own_a(plain_model: ir.Model, tmp_path: Path) -> None:
    """They would have no name together."""
    value = plain_model.graph.initializers["layers.0.k.weight"]
    value.name = "layers.0.other.k.weight"
    groups = {"layers.0.qkv": ["layers.0.q", "layers.0.other.k", "layers.0.v"]}
    assert names_of_As(plain_model, tmp_path, groups) == [
        "layers.0.q+v.lora_A.weight",
        "layers.0.other.k.lora_A.weight",
    ]


def test_layers_of_a_group_that_read_something_else_keep_their_own_a(
    plain_model: ir.Model, tmp_path: Path
) -> None:
    """A graph may have changed what one of them reads: another input's product would be a wrong number."""
    node = next(n for n in plain_model.graph if n.inputs[1].name == "layers.0.k.weight")
    doubled = ir.node("Add", [node.inputs[0], node.inputs[0]])
    doubled.outputs[0].name = "doubled"
    plain_model.graph.insert_before(node, doubled)
    node.replace_input_with(0, doubled.outputs[0])
    assert names_of_As(plain_model, tmp_path) == [
        "layers.0.q+v.lora_A.weight",
        "layers.0.k.lora_A.weight",
    ]


def test_a_fixed_rank_shares_columns_out_evenly(
    model: ir.Model, weights: Arrays, tmp_path: Path
) -> None:
    x = np.random.default_rng(6).normal(size=(2, 3, 6)).astype(np.float32)
    plain = run(model, {"x": x})
    with WeightFile(tmp_path / "w") as file:
        step = AddLoraSlotsPass(lambda found: found[:3], file, 4, GROUPS)
        step(model)
    assert step.added is not None and step.added.rank == 4
    assert not any(name.endswith("ranks") for name in step.added.names)
    assert (tmp_path / "w").stat().st_size == 6 * 3 * 4 * 4  # the joint A is the largest
    ir.save(model, tmp_path / "model.onnx")
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], plain)
    change = drawn(GROUPS["layers.0.qkv"], [4, 4, 4])
    given = {n: a for n, a in joint(change).items() if not n.endswith("ranks")}
    (result,) = session.run(None, {"x": x, **given})
    np.testing.assert_allclose(result, expected(weights, x, change), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("graph", ["model", "plain_model"])
def test_rows_of_a_batch_use_adapters_of_their_own(
    graph: str, weights: Arrays, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(graph)
    x = np.random.default_rng(3).normal(size=(3, 2, 6)).astype(np.float32)
    step = AddAdapterBankPass(lambda found: found[:3], GROUPS)
    step(model)
    assert step.added is not None
    change = drawn(GROUPS["layers.0.qkv"], [2, 4, 1])
    banks = joint(change, entries=1)
    assert banks.keys() == set(step.added.names)
    result = run(model, {"x": x, "adapter_ids": np.array([1, 0, 1]), **banks})
    for row, own in enumerate((change, {}, change)):
        wanted = expected(weights, x[row], own)
        np.testing.assert_allclose(result[row], wanted, rtol=1e-4, atol=1e-4)
