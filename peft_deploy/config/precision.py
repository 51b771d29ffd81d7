"""The precisions that a bundle can have."""

from __future__ import annotations

from dataclasses import dataclass

from peft_deploy.errors import ConfigError


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
BFLOAT16 = "bfloat16"
NO_BFLOAT16 = (
    "onnxruntime's CPU provider has no kernels for MatMul, Add, Mul, Softmax and most other operators "
    "in bfloat16"
)
PRECISIONS: dict[str, Precision] = {
    precision.name: precision
    for precision in (
        Precision(FP32, "float32"),
        Precision("fp16", "float16"),
        Precision("bf16", BFLOAT16),
    )
}


def precision_dtype(name: str) -> str:
    """The element type that a bundle of this precision computes in.

    Raises:
        ConfigError: nobody knows it.
    """
    if name not in PRECISIONS:
        raise ConfigError(
            f"the precision {name!r} is unknown; it can be {', '.join(PRECISIONS)}",
            hint="a bundle of another precision was made by a newer release: update peft-deploy",
        )
    return PRECISIONS[name].dtype
