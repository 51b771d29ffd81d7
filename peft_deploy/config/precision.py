"""The precisions that a bundle can have."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Precision:
    """What a graph computes in and how its weights are kept.

    Args:
        name: as users give it and manifests keep it.
        dtype: of the arithmetic, the cache, the slots for adapters, and the weights that are not quantized.
        quantized: whether linear weights are kept in a type of their own.
    """

    name: str
    dtype: str
    quantized: bool = False


FP32 = "fp32"
PRECISIONS: dict[str, Precision] = {
    precision.name: precision for precision in (Precision(FP32, "float32"),)
}


def precision_dtype(name: str) -> str:
    """The element type that a bundle of this precision computes in."""
    return PRECISIONS[name].dtype
