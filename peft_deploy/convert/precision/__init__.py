"""What makes a graph compute in another precision than the one it was traced in.

Weights come in the types that they are stored in; what is added here are the conversions between the types, which
operators keep float32, and those that read quantized weights.
"""

from peft_deploy.convert.precision.block_quantized import QuantizedWeights, ReadQuantizedPass
from peft_deploy.convert.precision.half import HalfPrecision, HalfPrecisionPass

__all__ = ["HalfPrecision", "HalfPrecisionPass", "QuantizedWeights", "ReadQuantizedPass"]
