"""Greedy decoding on either side, in loops that share nothing with the product's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort


def session(bundle: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(bundle / "model.onnx", options, ["CPUExecutionProvider"])


def plain_loop(
    bundle: Path, prompt: list[int], steps: int, adapter: Path | None = None
) -> tuple[list[int], list[Any]]:
    """Greedy tokens and the logits behind them, from nothing but onnxruntime and numpy.

    An adapter is onnxruntime's own affair here.
    """
    run, options = session(bundle), ort.RunOptions()
    if adapter is not None:
        active = ort.LoraAdapter()
        active.Load(str(adapter))
        options.add_active_adapter(active)
    cache = {
        i.name: np.zeros([1 if isinstance(d, str) else d for d in i.shape], "float32")[:, :, :0]
        for i in run.get_inputs()
        if i.name.startswith("past")
    }
    new, tokens, logits = np.array([prompt]), [], []
    for _ in range(steps):
        past = next(iter(cache.values())).shape[2]
        total = past + new.shape[1]
        feeds = {
            "input_ids": new,
            "attention_mask": np.ones((1, total), "int64"),
            "position_ids": np.arange(past, total)[None],
            **cache,
        }
        out, *present = run.run(None, feeds, options)
        cache = dict(zip(cache, present, strict=True))
        logits.append(out[0, -1])
        tokens.append(int(out[0, -1].argmax()))
        new = np.array([[tokens[-1]]])
    return tokens, logits


def paddle_loop(model: Any, prompt: list[int], steps: int) -> tuple[list[int], list[Any]]:
    """The same from the dynamic graph, without a cache."""
    import paddle

    ids, tokens, logits = list(prompt), [], []
    for _ in range(steps):
        with paddle.no_grad():
            out = model(paddle.to_tensor([ids]), return_dict=True).logits.numpy()
        logits.append(out[0, -1])
        tokens.append(int(out[0, -1].argmax()))
        ids.append(tokens[-1])
    return tokens, logits


def node_names(bundle: Path) -> list[tuple[str, str]]:
    """Name and operator of every node, in order."""
    return [(n.name, n.op_type) for n in ir.load(bundle / "model.onnx").graph]
