"""What onnx-ir reports while it works."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_onnx_ir() -> Iterator[None]:
    """Keeps what is meant here out of the log: dangling names, and operators that the onnx package does not know yet.

    PaddleNLP lets through everything from INFO on, and onnx-ir adds the call stack.
    """
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
