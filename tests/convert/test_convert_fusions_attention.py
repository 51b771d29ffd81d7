"""Attention and rotation on graphs as the stand-ins give them: where the operators come in, and equal results."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from peft_deploy.convert.fusions import FusionReport, run_fusions

F, INT = TensorProto.FLOAT, TensorProto.INT64
D, POSITIONS = 6, 11
MASKED = float(np.finfo(np.float32).min) / 2
RNG = np.random.default_rng(0)
CASES = [(1, 5, 0), (1, 1, 4), (3, 4, 0), (2, 3, 2)]  # batch, new tokens, past


class Builder:
    """A graph in the making, its nodes called after one module."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.inputs: dict[str, tuple[int, list[Any]]] = {}
        self.outputs: list[tuple[str, list[Any] | None]] = []

    def node(self, operator: str, inputs: list[str], outputs: Any = 1, **attributes: Any) -> Any:
        number = len(self.nodes)
        if isinstance(outputs, int):
            outputs = [f"v{number}_{i}" for i in range(outputs)]
        name = f"/attn/{operator}_{number}"
        self.nodes.append(helper.make_node(operator, inputs, outputs, name=name, **attributes))
        return outputs[0] if len(outputs) == 1 else outputs

    def constant(self, array: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = np.asarray(array)
        return name

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def input(self, name: str, dims: list[Any], kind: int = F) -> str:
        self.inputs[name] = (kind, dims)
        return name

    def model(self) -> ir.Model:
        values = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes,
            "g",
            [values(name, kind, dims) for name, (kind, dims) in self.inputs.items()],
            [values(name, F, dims) for name, dims in self.outputs],
            [numpy_helper.from_array(v, k) for k, v in self.constants.items()],
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        return ir.from_proto(made)

    def feeds(self, batch: int, new: int, past: int) -> dict[str, Any]:
        """Random numbers; the last row of the batch may attend to nothing with its first token."""
        sizes = {"B": batch, "S": new, "P": past, "T": past + new}
        given = {}
        for name, (kind, dims) in self.inputs.items():
            shape = [sizes.get(dim, dim) for dim in dims]
            if kind == INT:
                given[name] = RNG.integers(0, POSITIONS, shape)
            elif name == "mask":
                mask = np.where(RNG.random(shape) < 0.7, 0, MASKED) + RNG.random(shape)
                mask[-1, :, 0] = MASKED
                given[name] = mask.astype(np.float32)
            else:
                given[name] = RNG.standard_normal(shape).astype(np.float32)
        return given


def heads(b: Builder, x: str, count: int) -> str:
    split = b.node("Reshape", [x, b.ints(0, 0, count, D)])
    return str(b.node("Transpose", [split], perm=[0, 2, 1, 3]))


def table(b: Builder, pairs: int, positions: str) -> tuple[str, str]:
    """Cos and sin [B, 1, S, pairs]."""
    angles = RNG.random((POSITIONS, pairs)) * 6
    rows = [
        b.node("Gather", [b.constant(f(angles).astype(np.float32)), positions], axis=0)
        for f in (np.cos, np.sin)
    ]
    cos, sin = (b.node("Unsqueeze", [row, b.ints(1)]) for row in rows)
    return cos, sin


def rotate_halves(b: Builder, x: str, cos: str, sin: str) -> str:
    one, two = b.node("Split", [x], 2, axis=3, num_outputs=2)
    products = [b.node("Mul", pair) for pair in ([one, cos], [two, sin], [two, cos], [one, sin])]
    parts = [b.node("Sub", products[:2]), b.node("Add", products[2:])]
    return str(b.node("Concat", parts, axis=3))


def spread(b: Builder, cos: str, sin: str, signs: list[float]) -> tuple[str, str]:
    places = b.ints(*(i // 2 for i in range(len(signs))))
    cos, sin = (b.node("Gather", [value, places], axis=-1) for value in (cos, sin))
    return cos, b.node("Mul", [sin, b.constant(np.array(signs, np.float32))])


def rotate_neighbours(b: Builder, x: str, cos: str, sin: str, partner: list[int]) -> str:
    part, rest = x, None
    if len(partner) < D:
        sizes = b.ints(len(partner), D - len(partner))
        part, rest = b.node("Split", [x, sizes], 2, axis=3)
    other = b.node("Gather", [part, b.ints(*partner)], axis=-1)
    turned = b.node("Add", [b.node("Mul", [part, cos]), b.node("Mul", [other, sin])])
    return str(b.node("Concat", [turned, rest], axis=3)) if rest else str(turned)


def attention(
    b: Builder,
    q: str,
    k: str,
    v: str,
    mask: str,
    sizes: tuple[int, int],
    *,
    scale: float | None = 0.3,
    past: bool = True,
) -> str:
    """What ``cached_attention`` or ``grouped_attention`` is converted to, [B, S, H * D], and a node that reads it."""
    H, K = sizes
    if past:
        for name, new in (("key", k), ("value", v)):
            old = b.input(f"past.{name}", ["B", K, "P", D])
            b.node("Concat", [old, new], [f"present.{name}"], axis=2)
            b.outputs.append((f"present.{name}", ["B", K, "T", D]))
        k, v = "present.key", "present.value"
    if H != K:
        q = b.node("Reshape", [q, b.ints(0, K, H // K, -1, D)])
        k, v = (b.node("Unsqueeze", [value, b.ints(2)]) for value in (k, v))
        mask = b.node("Unsqueeze", [mask, b.ints(1)])
    if scale is not None:
        q = b.node("Mul", [q, b.constant(np.float32(scale))])
    turned = b.node("Transpose", [k], perm=[0, 1, 3, 2] if H == K else [0, 1, 2, 4, 3])
    scores = b.node("Add", [b.node("MatMul", [q, turned]), mask])
    out = b.node("MatMul", [b.node("Softmax", [scores], axis=-1), v])
    if H != K:
        out = b.node("Reshape", [out, b.ints(0, H, -1, D)])
    out = b.node("Transpose", [out], perm=[0, 2, 1, 3])
    joined = b.node("Reshape", [out, b.ints(0, 0, H * D)])
    return str(b.node("Neg", [joined], ["y"]))


def fuse_and_compare(
    b: Builder, cases: list[tuple[int, int, int]]
) -> tuple[FusionReport, ir.Model]:
    """Fuses the graph; every result is what it was."""
    model = b.model()
    before = ir.to_proto(model).SerializeToString()
    report = run_fusions(model, "onnx")
    after = ir.to_proto(model).SerializeToString()
    plain, fused = (
        ort.InferenceSession(data, providers=["CPUExecutionProvider"]) for data in (before, after)
    )
    assert [o.name for o in fused.get_outputs()] == [o.name for o in plain.get_outputs()]
    for case in cases:
        feeds = b.feeds(*case)
        for got, wanted in zip(fused.run(None, feeds), plain.run(None, feeds), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=2e-6)
    return report, model


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def projected(b: Builder, H: int, K: int) -> list[str]:
    sizes = zip("qkv", (H, K, K), strict=True)
    return [heads(b, b.input(name, ["B", "S", n * D]), n) for name, n in sizes]


@pytest.mark.parametrize(
    ("H", "K", "mask_heads", "scale"),
    [
        (6, 2, 1, 0.3),
        (4, 4, 1, 0.3),
        (4, 4, 4, None),
        (3, 1, 1, 0.3),
        (3, 1, 3, 0.3),
        (1, 1, 1, 1.7),
    ],
)
def test_attention_with_a_cache_becomes_one_operator(
    H: int, K: int, mask_heads: int, scale: float | None
) -> None:
    b = Builder()
    q, k, v = projected(b, H, K)
    mask = b.input("mask", ["B", mask_heads, "S", "T"])
    attention(b, q, k, v, mask, (H, K), scale=scale)
    b.outputs.insert(0, ("y", ["B", "S", H * D]))
    report, model = fuse_and_compare(b, CASES)
    assert kinds(model) == ["Attention", "Neg"]
    node = model.graph[0]
    assert node.name == "/attn/Attention"
    assert node.attributes["q_num_heads"].as_int() == H
    assert node.attributes["kv_num_heads"].as_int() == K
    assert report.fused["Attention"] == report.fused["Attention: cache"] == 1
    assert report.fused["Attention: heads last"] == 1
    assert report.plain == {}


def test_a_mask_of_one_row_is_repeated_once_for_all_layers() -> None:
    b = Builder()
    mask, x = b.input("mask", ["B", 1, 1, "S"]), b.input("x", ["B", "S", 2 * D])
    for i in range(2):
        q, k, v = (heads(b, x, 2) for _ in range(3))
        out = attention(b, q, k, v, mask, (2, 2), past=False)
        x = b.nodes[-1].output[0] = f"{out}{i}"
    b.outputs.append((x, ["B", "S", 2 * D]))
    report, model = fuse_and_compare(b, [(3, 4, 0), (1, 1, 0)])
    expected = ["Attention", "Attention", "Concat", "Expand", "Neg", "Neg", "Shape"]
    assert sorted(kinds(model)) == expected
    assert report.fused["Attention: one mask for all queries"] == 2


def test_heads_that_do_not_come_from_projections_stay_first() -> None:
    b = Builder()
    H = 3
    fused = b.input("qkv", ["B", "S", 3 * H * D])
    split = b.node("Reshape", [fused, b.ints(0, 0, H, 3 * D)])
    turned = b.node("Transpose", [split], perm=[0, 2, 1, 3])
    q, k, v = b.node("Split", [turned], 3, axis=3, num_outputs=3)
    attention(b, q, k, v, b.input("mask", ["B", 1, "S", "T"]), (H, H))
    b.outputs.insert(0, ("y", ["B", "S", H * D]))
    report, model = fuse_and_compare(b, CASES)
    assert kinds(model).count("Attention") == report.fused["Attention: cache"] == 1
    assert report.fused["Attention: heads last"] == 0


@pytest.mark.parametrize(
    ("mask_dims", "reason"),
    [
        # A mask a head of a group is no mask of the operator's.
        (["B", 2, "S", "T"], "what is added to the scores is not the same for all groups"),
        (["B", None, "S", "T"], "what is added to the scores is not the same for all groups"),
    ],
)
def test_a_mask_that_differs_within_a_group_keeps_attention_plain(
    mask_dims: list[Any], reason: str
) -> None:
    b = Builder()
    q, k, v = projected(b, 4, 2)
    attention(b, q, k, v, b.input("mask", mask_dims), (4, 2))
    b.outputs.insert(0, ("y", ["B", "S", 4 * D]))
    model = b.model()
    before = kinds(model)
    report = run_fusions(model, "onnx")
    assert kinds(model) == before
    assert report.plain["Attention"] == {reason: ["/attn"]}


def test_a_cache_that_something_else_reads_too_is_joined_outside() -> None:
    b = Builder()
    q, k, v = projected(b, 2, 2)
    attention(b, q, k, v, b.input("mask", ["B", 1, "S", "T"]), (2, 2))
    b.node("Neg", ["present.key"], ["z"])
    b.outputs += [("y", ["B", "S", 2 * D]), ("z", None)]
    report, model = fuse_and_compare(b, CASES)
    assert report.fused["Attention"] == 1 and report.fused["Attention: cache"] == 0
    assert kinds(model).count("Concat") == 2


SIGNS = [-1.0, 1.0]


@pytest.mark.parametrize(("pairs", "interleaved"), [(3, False), (3, True), (2, True), (1, True)])
@pytest.mark.parametrize("from_projection", [True, False])
def test_rotations_become_one_operator(
    pairs: int, interleaved: bool, from_projection: bool
) -> None:
    b = Builder()
    positions = b.input("positions", ["B", "S"], INT)
    x = (
        heads(b, b.input("x", ["B", "S", 2 * D]), 2)
        if from_projection
        else b.input("x", ["B", 2, "S", D])
    )
    cos, sin = table(b, pairs, positions)
    if interleaved:
        cos, sin = spread(b, cos, sin, SIGNS * pairs)
        out = rotate_neighbours(b, x, cos, sin, [i ^ 1 for i in range(2 * pairs)])
    else:
        out = rotate_halves(b, x, cos, sin)
    b.outputs.append((out, ["B", 2, "S", D]))
    report, model = fuse_and_compare(b, CASES[:3])
    assert report.fused["RotaryEmbedding"] == 1
    rest = ["Reshape", "Transpose"] if from_projection else []
    assert kinds(model) == ["RotaryEmbedding", *rest]


@pytest.mark.parametrize("position", [POSITIONS, -1])
def test_positions_outside_of_the_table_are_refused(position: int) -> None:
    b = Builder()
    positions = b.input("positions", ["B", "S"], INT)
    out = rotate_halves(b, b.input("x", ["B", 2, "S", D]), *table(b, 3, positions))
    b.outputs.append((out, ["B", 2, "S", D]))
    model = b.model()
    run_fusions(model, "onnx")
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    feeds = b.feeds(1, 2, 0) | {"positions": np.full((1, 2), position)}
    with pytest.raises(Exception, match="out of range"):
        session.run(None, feeds)


@pytest.mark.parametrize("fault", ["signs", "partner", "pairs", "positions", "tables"])
def test_what_only_looks_like_a_rotation_stays(fault: str) -> None:
    b = Builder()
    positions = b.input("positions", ["B", "S"], INT)
    cos, sin = table(b, 3, positions)
    if fault in ("positions", "tables"):
        if fault == "positions":
            _, sin = table(b, 3, b.input("others", ["B", "S"], INT))
        else:  # one column for all pairs
            cos, sin = table(b, 1, positions)
        out = rotate_halves(b, b.input("x", ["B", 2, "S", D]), cos, sin)
    else:
        partner = [2, 3, 0, 1, 5, 4] if fault == "partner" else [1, 0, 3, 2, 5, 4]
        signs = [1.0, -1.0, *SIGNS, *SIGNS] if fault == "signs" else SIGNS * 3
        cos, sin = spread(b, cos, sin, signs)
        if fault == "pairs":
            b.constants[b.nodes[-2].input[1]][:] = [0, 0, 2, 2, 1, 1]
        out = rotate_neighbours(b, b.input("x", ["B", 2, "S", D]), cos, sin, partner)
    b.outputs.append((out, ["B", 2, "S", D]))
    report, _ = fuse_and_compare(b, CASES[:3])
    assert report.fused["RotaryEmbedding"] == 0


def test_rotation_before_attention_leaves_heads_where_projections_have_them() -> None:
    b = Builder()
    q, k, v = projected(b, 6, 2)
    cos, sin = table(b, 3, b.input("positions", ["B", "S"], INT))
    q, k = rotate_halves(b, q, cos, sin), rotate_halves(b, k, cos, sin)
    attention(b, q, k, v, b.input("mask", ["B", 1, "S", "T"]), (6, 2))
    b.outputs.insert(0, ("y", ["B", "S", 6 * D]))
    _, model = fuse_and_compare(b, CASES)
    assert kinds(model) == ["RotaryEmbedding", "RotaryEmbedding", "Attention", "Neg"]
