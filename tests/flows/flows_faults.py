"""Faults in the files of a bundle."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir

from peft_deploy.bundle import MODEL


def with_scaled_weight(
    bundle: Path,
    copy: Path,
    name: str,
    *,
    factor: float = 1.01,
    dtype: type[np.generic] = np.float32,
) -> Path:
    """A copy of a bundle with one weight, in its external data, larger by a factor."""
    shutil.copytree(bundle, copy)
    graph = ir.load(copy / MODEL).graph
    tensor = graph.initializers[name].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    path, offset, shape = copy / tensor.location, tensor.offset or 0, tensor.shape.numpy()
    values = np.memmap(path, dtype, "r+", offset, tuple(shape))
    values[:] = (values.astype(np.float32) * factor).astype(dtype)
    values.flush()
    return copy
