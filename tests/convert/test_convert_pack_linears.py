"""Linear layers of one input as one: the same numbers, and an error where they do not read the same."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import NodeProto, TensorProto, helper

from peft_deploy.convert.graph import ConvertedGraph
from peft_deploy.convert.pack_linears import PackLinearsPass
from peft_deploy.errors import ConversionError
from peft_deploy.families import PackedLinear, PackRule, find_packed

F = TensorProto.FLOAT
PARTS = {"q_proj": 4, "k_proj": 2, "v_proj": 3}
RULE = PackRule("net.layers.{i}.attn", tuple(PARTS), "qkv_proj")
Arrays = dict[str, np.ndarray]


def weights(layers: int = 2, *, biased: bool = True) -> Arrays:
    """Of layers whose three parts add up to the next one's input, of 6 numbers."""
    rng = np.random.default_rng(5)
    found = {}
    for i in range(layers):
        for part, size in PARTS.items():
            module = f"net.layers.{i}.attn.{part}"
            found[f"{module}.weight"] = rng.normal(size=(6, size)).astype(np.float32)
            if biased:
                found[f"{module}.bias"] = rng.normal(size=size).astype(np.float32)
        found[f"net.layers.{i}.out.weight"] = rng.normal(size=(9, 6)).astype(np.float32)
    return found


def nodes_of(arrays: Mapping[str, np.ndarray], layers: int) -> list[NodeProto]:
    """Weights go by other names in a graph than in a model; the parts are computed last to first."""
    nodes, x = [], "x"
    for i in range(layers):
        for part in reversed(PARTS):
            module = f"net.layers.{i}.attn.{part}"
            path = f"/net/layers.{i}/attn/{part}"
            result = f"{path}/out"
            product = f"{path}/product" if f"{module}.bias" in arrays else result
            nodes.append(
                helper.make_node("MatMul", [x, f"p:{module}.weight"], [product], f"{path}/MatMul")
            )
            if product != result:
                added = [f"p:{module}.bias", product]
                nodes.append(helper.make_node("Add", added, [result], f"{path}/Add"))
        parts = [f"/net/layers.{i}/attn/{part}/out" for part in PARTS]
        nodes.append(helper.make_node("Concat", parts, [f"c{i}"], f"/net/Concat_{i}", axis=-1))
        out = f"x{i + 1}" if i < layers - 1 else "y"
        weight = f"p:net.layers.{i}.out.weight"
        nodes.append(helper.make_node("MatMul", [f"c{i}", weight], [out], f"/net/out{i}/MatMul"))
        x = out
    return nodes


def converted(arrays: Arrays, nodes: list[NodeProto]) -> ConvertedGraph:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", F, ["batch", 6])],
        [helper.make_tensor_value_info("y", F, ["batch", 6])],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    shapes = {name: array.shape for name, array in arrays.items()}
    return ConvertedGraph(ir.from_proto(proto), {f"p:{n}": n for n in arrays}, shapes, {}, {}, {})


def run(graph: ConvertedGraph, arrays: Arrays, x: np.ndarray) -> np.ndarray:
    """The graph's result, its dangling weights filled in."""
    model = graph.model
    dangling = {
        value.name: value
        for node in model.graph
        for value in node.inputs
        if value is not None and value.producer() is None and value.name in graph.parameters
    }
    for name, value in dangling.items():
        value.const_value = ir.tensor(arrays[graph.parameters[name]], name=name)
        model.graph.register_initializer(value)
    data = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"x": x})
    return np.asarray(result)


def packed_arrays(groups: list[PackedLinear], arrays: Arrays) -> Arrays:
    tensors = {name: own for group in groups for name, own in group.tensors.items()}
    made = {n: np.concatenate([arrays[o] for o in own], -1) for n, own in tensors.items()}
    return {**arrays, **made}


@pytest.mark.parametrize("biased", [True, False])
def test_the_same_numbers_from_one_product(biased: bool) -> None:
    arrays = weights(biased=biased)
    groups = find_packed([RULE], arrays)
    x = np.random.default_rng(6).normal(size=(5, 6)).astype(np.float32)
    plain = run(converted(arrays, nodes_of(arrays, 2)), arrays, x)
    graph = converted(arrays, nodes_of(arrays, 2))
    PackLinearsPass(groups, graph)(graph.model)
    kinds = [node.op_type for node in graph.model.graph]
    assert [kinds.count(kind) for kind in ("MatMul", "Add", "Split")] == [4, 2 * biased, 2]
    names = {node.name for node in graph.model.graph}
    assert "/net/layers.1/attn/qkv_proj/MatMul" in names
    split = next(n for n in graph.model.graph if n.name == "/net/layers.1/attn/qkv_proj/Split")
    assert [v.name for v in split.outputs] == [f"/net/layers.1/attn/{p}/out" for p in PARTS]
    result = run(graph, packed_arrays(groups, arrays), x)
    np.testing.assert_allclose(result, plain, rtol=1e-5, atol=1e-5)


def test_groups_are_found_by_names() -> None:
    """In the order of the layers; only where all parts are there, and all or none of them have biases."""
    arrays = weights(11)
    found = find_packed([RULE], arrays)
    assert [group.module for group in found] == [
        f"net.layers.{i}.attn.qkv_proj" for i in range(11)
    ]
    assert found[0].parts == tuple(f"net.layers.0.attn.{part}" for part in PARTS)
    assert found[0].biased and not find_packed([RULE], weights(biased=False))[0].biased
    for gone in ("net.layers.3.attn.k_proj.weight", "net.layers.3.attn.v_proj.bias"):
        fewer = find_packed([RULE], arrays.keys() - {gone})
        assert [g.module for g in fewer] == [
            g.module for g in found if g.module != "net.layers.3.attn.qkv_proj"
        ]
    head = PackRule("head", ("a", "b"), "ab")
    assert find_packed([head], ["head.a.weight", "head.b.weight"]) == [
        PackedLinear("head.ab", ("head.a", "head.b"), biased=False)
    ]


def test_parts_of_different_inputs_are_refused() -> None:
    arrays = weights()
    nodes = nodes_of(arrays, 2)
    next(n for n in nodes if n.name == "/net/layers.1/attn/k_proj/MatMul").input[0] = "x"
    graph = converted(arrays, nodes)
    with pytest.raises(ConversionError, match=r"layers\.1\.attn\.k_proj reads x,"):
        PackLinearsPass(find_packed([RULE], arrays), graph)(graph.model)


def test_a_weight_that_is_used_twice_is_refused() -> None:
    arrays = weights()
    nodes = nodes_of(arrays, 2)
    shared = "p:net.layers.0.attn.k_proj.weight"
    next(n for n in nodes if n.name == "/net/layers.1/attn/k_proj/MatMul").input[1] = shared
    graph = converted(arrays, nodes)
    with pytest.raises(
        ConversionError, match=r"0\.attn\.k_proj\.weight should be used by one MatMul"
    ):
        PackLinearsPass(find_packed([RULE], arrays), graph)(graph.model)


def test_a_product_that_is_used_without_its_bias_is_refused() -> None:
    arrays = weights()
    nodes = nodes_of(arrays, 2)
    concat = next(n for n in nodes if n.name == "/net/Concat_0")
    concat.input[0] = "/net/layers.0/attn/q_proj/product"
    graph = converted(arrays, nodes)
    with pytest.raises(ConversionError, match=r"q_proj\.bias is not added to the result"):
        PackLinearsPass(find_packed([RULE], arrays), graph)(graph.model)
