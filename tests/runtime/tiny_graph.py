"""A small decoder as an ONNX graph and, written separately, in numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from peft_deploy.signature import GraphSignature, causal_lm_signature

L, H, K, D, E = 2, 4, 2, 8, 32
VOCAB = 290
MAX_POSITIONS = 64
EPSILON = 1e-5


def signature(vocab: int = VOCAB) -> GraphSignature:
    return causal_lm_signature(num_layers=L, num_kv_heads=K, head_dim=D, vocab_size=vocab)


def make_weights(vocab: int = VOCAB, seed: int = 14) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 0.25) -> np.ndarray:
        return rng.normal(0, scale, shape).astype(np.float32)

    angles = np.arange(MAX_POSITIONS)[:, None] * 10000.0 ** (-np.arange(D // 2) / (D // 2))
    weights = {
        "embed": normal(vocab, E, scale=1.0),
        "head": normal(E, vocab, scale=0.5),
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
    }
    for i in range(L):
        weights[f"{i}.q"] = normal(E, H * D)
        weights[f"{i}.k"] = normal(E, K * D)
        weights[f"{i}.v"] = normal(E, K * D)
        weights[f"{i}.o"] = normal(H * D, E)
        weights[f"{i}.up"] = normal(E, 2 * E)
        weights[f"{i}.down"] = normal(2 * E, E)
    return weights


class _Builder:
    """Collects nodes; every call gives the name of the node's output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def const(self, value: object, dtype: type = np.int64) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def op(self, kind: str, *inputs: str, out: str | None = None, **attributes: object) -> str:
        name = out or f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def size(self, tensor: str, axis: int) -> str:
        return self.op("Gather", self.op("Shape", tensor), self.const([axis]))

    def norm(self, x: str) -> str:
        square = self.op("ReduceMean", self.op("Mul", x, x), axes=[-1], keepdims=1)
        root = self.op("Sqrt", self.op("Add", square, self.const(EPSILON, np.float32)))
        return self.op("Div", x, root)

    def heads(self, x: str, weight: str, count: int) -> str:
        split = self.op("Reshape", self.op("MatMul", x, weight), self.const([0, 0, count, D]))
        return self.op("Transpose", split, perm=[0, 2, 1, 3])

    def rotate(self, x: str, cos: str, sin: str) -> str:
        half = self.const([D // 2])
        end, last = self.const([D]), self.const([3])
        a = self.op("Slice", x, self.const([0]), half, last)
        b = self.op("Slice", x, half, end, last)
        left = self.op("Sub", self.op("Mul", a, cos), self.op("Mul", b, sin))
        right = self.op("Add", self.op("Mul", b, cos), self.op("Mul", a, sin))
        return self.op("Concat", left, right, axis=3)


def _bias(b: _Builder) -> str:
    """0 where a query may look, -1e9 elsewhere: [B, 1, 1, S, T]."""
    total = b.op("Squeeze", b.size("attention_mask", 1))
    past = b.op("Squeeze", b.size("past_key_values.0.key", 2))
    one, zero = b.op("Squeeze", b.const([1])), b.op("Squeeze", b.const([0]))
    keys = b.op("Unsqueeze", b.op("Range", zero, total, one), b.const([0]))  # [1, T]
    queries = b.op("Unsqueeze", b.op("Range", past, total, one), b.const([1]))  # [S, 1]
    causal = b.op("LessOrEqual", keys, queries)  # [S, T]
    seen = b.op("Cast", "attention_mask", to=TensorProto.BOOL)
    seen = b.op("Unsqueeze", seen, b.const([1, 2, 3]))  # [B, 1, 1, 1, T]
    allowed = b.op("And", causal, seen)
    return b.op("Where", allowed, b.const(0, np.float32), b.const(-1e9, np.float32))


def _layer(b: _Builder, i: int, x: str, bias: str, cos: str, sin: str) -> str:
    h = b.norm(x)
    q = b.rotate(b.heads(h, f"{i}.q", H), cos, sin)
    k = b.rotate(b.heads(h, f"{i}.k", K), cos, sin)
    v = b.heads(h, f"{i}.v", K)
    k = b.op("Concat", f"past_key_values.{i}.key", k, axis=2, out=f"present.{i}.key")
    v = b.op("Concat", f"past_key_values.{i}.value", v, axis=2, out=f"present.{i}.value")
    q = b.op("Reshape", q, b.const([0, K, H // K, -1, D]))  # [B, K, H/K, S, D]
    k = b.op("Transpose", b.op("Unsqueeze", k, b.const([2])), perm=[0, 1, 2, 4, 3])
    scores = b.op("Mul", b.op("MatMul", q, k), b.const(D**-0.5, np.float32))
    chances = b.op("Softmax", b.op("Add", scores, bias), axis=-1)
    mixed = b.op("MatMul", chances, b.op("Unsqueeze", v, b.const([2])))
    mixed = b.op("Transpose", b.op("Reshape", mixed, b.const([0, H, -1, D])), perm=[0, 2, 1, 3])
    mixed = b.op("Reshape", mixed, b.const([0, 0, H * D]))
    x = b.op("Add", x, b.op("MatMul", mixed, f"{i}.o"))
    up = b.op("MatMul", b.norm(x), f"{i}.up")
    up = b.op("Mul", up, b.op("Sigmoid", up))
    return b.op("Add", x, b.op("MatMul", up, f"{i}.down"))


def make_model(weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    b = _Builder()
    bias = _bias(b)
    cos, sin = (
        b.op("Unsqueeze", b.op("Gather", table, "position_ids"), b.const([1]))
        for table in ("cos", "sin")
    )
    x = b.op("Gather", "embed", "input_ids")
    for i in range(L):
        x = _layer(b, i, x, bias, cos, sin)
    b.op("MatMul", b.norm(x), "head", out="logits")
    sig = signature(weights["embed"].shape[0])
    types = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT}
    inputs, outputs = (
        [helper.make_tensor_value_info(s.name, types[s.dtype], list(s.dims)) for s in specs]
        for specs in (sig.inputs, sig.outputs)
    )
    stored = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(b.nodes, "tiny", inputs, outputs, [*stored, *b.constants])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def save_model(folder: Path, weights: dict[str, np.ndarray]) -> Path:
    """Writes the model with its weights beside it."""
    path = folder / "model.onnx"
    onnx.save(
        make_model(weights),
        str(path),
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=256,  # constants that shapes depend on must stay in the model
        convert_attribute=False,
    )
    return path


def reference_logits(
    weights: dict[str, np.ndarray],
    ids: list[int],
    prefix: list[tuple[np.ndarray, np.ndarray]] | None = None,
) -> np.ndarray:
    """Logits [S, V] of one unpadded row, everything computed anew in float64, head by head."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    count = len(ids)
    x = w["embed"][ids]  # [S, E]
    for i in range(L):
        h = _norm(x)
        heads = []
        for head in range(H):
            group = head // (H // K)
            q = _rotated(h @ w[f"{i}.q"][:, head * D : (head + 1) * D], w)
            k = _rotated(h @ w[f"{i}.k"][:, group * D : (group + 1) * D], w)
            v = h @ w[f"{i}.v"][:, group * D : (group + 1) * D]
            before = 0
            if prefix is not None:
                before = prefix[i][0].shape[1]
                k = np.concatenate([prefix[i][0][group], k])
                v = np.concatenate([prefix[i][1][group], v])
            scores = q @ k.T / np.sqrt(D)  # [S, P + S]
            scores[np.triu_indices(count, before + 1, before + count)] = -np.inf
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(scores / scores.sum(-1, keepdims=True) @ v)
        x = x + np.concatenate(heads, -1) @ w[f"{i}.o"]
        up = _norm(x) @ w[f"{i}.up"]
        x = x + up / (1 + np.exp(-up)) @ w[f"{i}.down"]
    return _norm(x) @ w["head"]


def reference_greedy(
    weights: dict[str, np.ndarray],
    ids: list[int],
    count: int,
    prefix: list[tuple[np.ndarray, np.ndarray]] | None = None,
) -> list[int]:
    """The next tokens by full recomputation."""
    ids = list(ids)
    start = len(ids)
    for _ in range(count):
        ids.append(int(reference_logits(weights, ids, prefix)[-1].argmax()))
    return ids[start:]


def _norm(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON)


def _rotated(x: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
    cos, sin = w["cos"][: len(x)], w["sin"][: len(x)]
    a, b = x[:, : D // 2], x[:, D // 2 :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
