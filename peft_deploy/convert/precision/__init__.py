"""What makes a graph compute in another precision than the one it was traced in.

Weights come in the types that they are stored in; what is added here are the conversions between the types, and which
operators keep float32.
"""

from peft_deploy.convert.precision.half import HalfPrecision, HalfPrecisionPass

__all__ = ["HalfPrecision", "HalfPrecisionPass"]
