"""Checks graphs with a newer onnx, see check_newer_onnx.sh. Needs onnx and onnxruntime, nothing of peft-deploy.

check_newer_onnx.py DIR     DIR/small/MODEL/WAY/[encoder/]model.onnx, DIR/large/…
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx.reference import ReferenceEvaluator

# Of an output's largest magnitude: two float32 computations in different orders.
CLOSE = 1e-4
TOKENS = 40  # the smallest vocabulary has more


@dataclass(frozen=True)
class Case:
    """Sizes of one call; row 1 begins with two tokens of padding where ``padded``."""

    name: str
    batch: int
    new: int
    past: int
    padded: bool


CASES = (
    Case("prefill, padded", 2, 6, 0, True),
    Case("past, padded", 2, 3, 4, True),
    Case("decode", 3, 1, 7, False),
)


def main() -> int:
    """The command line; 1 when something is wrong."""
    root = Path(sys.argv[1])
    print(f"onnx {onnx.__version__}, onnxruntime {ort.__version__}")
    print(
        f"{'graph':38} opset  {'checker':8} {'shapes':8} reference against onnxruntime, fused operators"
    )
    bad = 0
    for path in sorted(root.rglob("model.onnx")):
        results = list(check(path, small=path.is_relative_to(root / "small")))
        bad += any(not good for good, _ in results)
        name = path.parent.relative_to(root).as_posix()
        print(f"{name:38} {'  '.join(text for _, text in results)}", flush=True)
    print("all good" if not bad else f"{bad} graphs FAILED")
    return int(bad > 0)


def check(path: Path, *, small: bool) -> Iterator[tuple[bool, str]]:
    """Each finding: whether it is good, and what to print."""
    model = onnx.load(path, load_external_data=small)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    yield True, f"{opset:5}"
    yield _attempt(lambda: onnx.checker.check_model(str(path), full_check=True))
    yield _attempt(lambda: _shapes(path))
    if small:
        yield _against_reference(model, path)
    fused = Counter(node.op_type for node in model.graph.node if node.op_type in FUSED)
    yield True, ", ".join(f"{count} {name}" for name, count in sorted(fused.items()))


# Operators that opset 17 does not have, and Gelu, which it spells out.
FUSED = {"Attention", "RotaryEmbedding", "RMSNormalization", "LayerNormalization", "Gelu", "Swish"}


def _attempt(call: Any) -> tuple[bool, str]:
    try:
        call()
    except Exception as exc:  # the checkers have no common base
        return False, f"FAILED: {' '.join(str(exc).split())[:300]}"
    return True, f"{'ok':8}"


def _shapes(path: Path) -> None:
    """Strict inference, and every output's inferred shape is the one that the graph declares.

    onnx does not infer what Attention gives as present keys and values when the past's length is open.
    """
    bare = onnx.load(path, load_external_data=False)
    declared = {value.name: _dims(value) for value in bare.graph.output}
    for value in bare.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(
        bare, check_type=True, strict_mode=True, data_prop=True
    )
    for value in inferred.graph.output:
        if not value.type.tensor_type.HasField("shape"):
            continue
        found, want = _dims(value), declared[value.name]
        fixed = [
            (a, b)
            for a, b in zip(found, want, strict=True)
            if isinstance(a, int) and isinstance(b, int)
        ]
        if any(a != b for a, b in fixed):
            raise ValueError(f"{value.name} is inferred as {found}, declared as {want}")


def _dims(value: onnx.ValueInfoProto) -> list[int | str]:
    dims = value.type.tensor_type.shape.dim
    return [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in dims]


def _against_reference(model: onnx.ModelProto, path: Path) -> tuple[bool, str]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    try:
        reference = ReferenceEvaluator(model)
        decodes = any(node.name.startswith("past_key_values") for node in session.get_inputs())
        worst = 0.0
        for case in CASES if decodes else CASES[:1]:
            feeds = _feeds(session, case)
            found = session.run(None, feeds)
            # Slots are left at their defaults, which the evaluator wants to be told.
            want = reference.run(None, {**_defaults(model, feeds), **feeds})
            names = [node.name for node in session.get_outputs()]
            for name, ours, theirs in zip(names, found, want, strict=True):
                if ours.shape != theirs.shape:
                    return (
                        False,
                        f"FAILED: {case.name}: {name} is {ours.shape}, reference {theirs.shape}",
                    )
                worst = max(worst, _error(ours, theirs))
    except Exception as exc:  # whatever the evaluator raises
        return False, f"FAILED: {type(exc).__name__}: {' '.join(str(exc).split())[:300]}"
    return worst <= CLOSE, f"{'' if worst <= CLOSE else 'FAILED '}{worst:.0e}"


def _error(ours: Any, theirs: Any) -> float:
    """The largest difference, in units of the largest magnitude; infinite where one of the two is no number."""
    if not ours.size:
        return 0.0
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return float("inf")
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-9))


def _feeds(session: ort.InferenceSession, case: Case) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    total = case.past + case.new
    keep = np.ones((case.batch, total), np.int64)
    if case.padded:
        keep[1, :2] = 0
    positions = np.maximum(keep.cumsum(1) - 1, 0)[:, case.past :]
    source = np.ones((case.batch, 5), np.int64)
    known = {
        "attention_mask": keep,
        "position_ids": positions,
        "token_type_ids": np.zeros_like(keep),
        "encoder_attention_mask": source,
    }
    sizes = {
        "batch": case.batch,
        "sequence": case.new,
        "past": case.past,
        "source": source.shape[1],
    }
    feeds = {}
    for node in session.get_inputs():
        shape = [sizes.get(dim, dim) for dim in node.shape]
        if node.name in known:
            feeds[node.name] = known[node.name]
        elif node.type == "tensor(int64)":
            feeds[node.name] = rng.integers(3, TOKENS, shape)
        else:
            feeds[node.name] = rng.normal(size=shape).astype(np.float32)
    if "past" not in {dim for node in session.get_inputs() for dim in node.shape}:
        length = feeds["input_ids"].shape[1]  # an encoder's
        feeds |= {
            n: a[:, :length] for n, a in feeds.items() if n in ("attention_mask", "token_type_ids")
        }
    return feeds


def _defaults(model: onnx.ModelProto, feeds: Mapping[str, Any]) -> dict[str, Any]:
    inputs = {node.name for node in model.graph.input} - feeds.keys()
    return {
        t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name in inputs
    }


if __name__ == "__main__":
    sys.exit(main())
