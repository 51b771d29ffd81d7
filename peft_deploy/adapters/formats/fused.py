"""LoRA on a fused projection, written as one ordinary pair of matrices.

PaddleNLP's LoRAMergedLinear adapts some of the parts (query, key, value) that one weight holds
interleaved head by head. Its A keeps one block of R columns for each adapted part, its B keeps for
each head the adapted parts side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peft_deploy.errors import AdapterError
from peft_deploy.weights.source import Array


def spread_parts(B: Array, enable_lora: Sequence[bool], head_dim: int) -> Array:
    """B of a fused projection, with zeros where a part is not adapted, so that A @ B is the whole
    change.

    Args:
        B: [R, H · n · D] with n adapted parts, heads outermost.
        enable_lora: for each of the fused parts, whether it is adapted.
        head_dim: D.

    Returns:
        [n · R, H · parts · D]; block k of rows serves the k-th adapted part.

    Raises:
        AdapterError: B's columns are not a whole number of heads.
    """
    enabled = [i for i, on in enumerate(enable_lora) if on]
    rank, columns = B.shape
    if not enabled or columns % (len(enabled) * head_dim):
        raise AdapterError(
            f"lora_B of shape {list(B.shape)} does not fit enable_lora {list(enable_lora)} "
            f"with head_dim {head_dim}"
        )
    heads = columns // (len(enabled) * head_dim)
    by_head = B.reshape(rank, heads, len(enabled), head_dim)
    spread = np.zeros((len(enabled), rank, heads, len(enable_lora), head_dim), B.dtype)
    for k, part in enumerate(enabled):
        spread[k, :, :, part] = by_head[:, :, k]
    return spread.reshape(len(enabled) * rank, heads * len(enable_lora) * head_dim)
