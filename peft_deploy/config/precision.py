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
        bits: of a number in the weights of linear layers inside of a model's layers; None where they are as ``dtype``.
        head_bits: likewise of those outside, such as the head, and of a table of embeddings that the head shares.
    """

    name: str
    dtype: str
    bits: int | None = None
    head_bits: int | None = None

    @property
    def quantized(self) -> bool:
        """Whether any weights are kept as small whole numbers."""
        return self.bits is not None

    @property
    def in_16_bits(self) -> bool:
        """Whether it computes in 16 bits, and not in float32."""
        return self.dtype != "float32"


FP32 = "fp32"
CALIBRATED_BITS = 4  # of weights whose scales a text can choose; 8 bits are fine enough
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
# The head decides between tokens: on SmolLM2-135M with all other layers in 4 bits, a KL divergence of 0.28 became 0.37
# when the head got 4 bits, too.
PRECISIONS |= {
    precision.name: precision
    for precision in (
        Precision("int8", "float32", 8, 8),
        Precision("int8-linears", "float32", 8, None),
        Precision("int4", "float32", 4, 8),
        Precision("int4-all", "float32", 4, 4),
        Precision("int4-linears", "float32", 4, None),
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
