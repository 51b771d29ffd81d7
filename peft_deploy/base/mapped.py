"""Parameters whose numbers lie in temporary files: of a large model, only those that are at work are in memory.

The files have no names, and their space is given back with the parameters. Needs Paddle.
"""

from __future__ import annotations

from peft_deploy.environment import require_paddle

require_paddle("building the Paddle model")

import mmap
import os
import tempfile
import warnings
from typing import Any
from weakref import WeakSet

import numpy as np
import paddle
from paddle import nn

from peft_deploy.weights import DTYPES, Array, contiguous
from peft_deploy.weights.blocks import row_blocks

LEAST = 1 << 20  # bytes of a parameter that is worth a file
_live: WeakSet[mmap.mmap] = WeakSet()


def fill_mapped(parameter: paddle.Tensor, data: Array, dtype: str) -> bool:
    """Gives a parameter its numbers in a file of its own; it can be used and changed as any other.

    Args:
        parameter: without memory yet, or with any.
        data: its numbers, in any memory order and type.
        dtype: of the parameter: ``float32`` or ``float64``.

    Returns:
        False, and nothing was done, where the folder of temporary files has no room.
    """
    size = data.size * DTYPES[dtype].itemsize
    try:
        with tempfile.TemporaryFile(prefix="peft-deploy-") as file:
            os.posix_fallocate(
                file.fileno(), 0, size
            )  # now: later, a full disk would end the process
            pages = mmap.mmap(file.fileno(), size)
    except OSError as exc:
        warnings.warn(
            f"{size / 1e6:.0f} MB cannot be written to {tempfile.gettempdir()}, and are kept in memory: {exc}; "
            "TMPDIR names another folder",
            stacklevel=2,
        )
        return False
    array = np.frombuffer(pages, DTYPES[dtype]).reshape(data.shape)
    for rows in row_blocks(data.shape, DTYPES[dtype].itemsize):
        array[rows] = contiguous(data[rows], DTYPES[dtype])
    tensor = paddle.base.core.DenseTensor()
    tensor.set(
        array, paddle.CPUPlace(), True
    )  # the array's own memory, which the tensor keeps alive
    parameter.get_tensor()._share_data_with(tensor)
    _live.add(pages)
    release_pages()
    return True


def release_pages() -> None:
    """Takes what lies in files out of memory; it comes back when it is read."""
    for pages in list(_live):
        pages.madvise(mmap.MADV_DONTNEED)


def release_after_use(model: nn.Layer) -> None:
    """Lets every layer of a model with a large parameter of its own give the pages back once it has run.

    Args:
        model: with its adapter, if it has one.
    """

    def release(_layer: nn.Layer, _inputs: Any, _result: Any) -> None:
        release_pages()

    for layer in model.sublayers(include_self=True):
        own = layer.parameters(include_sublayers=False)
        if any(parameter.size * parameter.element_size() >= LEAST for parameter in own):
            layer.register_forward_post_hook(release)
