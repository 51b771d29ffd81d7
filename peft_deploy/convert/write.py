"""Streams a model and its weights to disk."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from peft_deploy.convert.postflight import MAX_INLINE_BYTES
from peft_deploy.progress import Progress


def write_model(model: ir.Model, path: Path, data_name: str, progress: Progress) -> None:
    """Writes ``path`` and, beside it, all weights into one file.

    Tensors are read one at a time while they are written; nothing holds two.

    Args:
        model: the graph, its weights lazy.
        path: where the graph goes.
        data_name: name of the weights' file, relative to ``path`` as ONNX wants it.
        progress: gets a phase counted in bytes.
    """
    total = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes > MAX_INLINE_BYTES
    )
    progress.phase("Writing weights", total, "bytes")

    def written(tensor: ir.TensorProtocol, _info: object) -> None:
        progress.advance(tensor.nbytes, tensor.name or "")

    ir.save(
        model,
        path,
        external_data=data_name,
        size_threshold_bytes=MAX_INLINE_BYTES,
        callback=written,
    )
