"""Whether a model's activations stay within the range of a 16-bit type."""

from __future__ import annotations

from collections.abc import Mapping

from peft_deploy.errors import ParityError, listed
from peft_deploy.weights.cast import LARGEST

# Other texts reach further than those of a check: below this share of the range there is room for that.
ROOM = 0.25


def check_range(peaks: Mapping[str, float], dtype: str) -> list[str]:
    """Passes when no activation was too large for a type.

    Args:
        peaks: module → the largest magnitude that it took or gave on real texts.
        dtype: that a bundle computes in.

    Returns:
        A warning that names the modules with little room left, if there are any.

    Raises:
        ParityError: an activation was larger than the type's largest number, or not a number.
    """
    largest = LARGEST[dtype]
    over = {name: peak for name, peak in peaks.items() if not peak <= largest}
    if over:
        raise ParityError(
            f"activations of {len(over)} modules are too large for {dtype}, whose largest number is {largest:.5g}:\n"
            + _named(over),
            hint="export it with --precision bf16, which has the range of fp32, or --precision fp32",
        )
    near = {name: peak for name, peak in peaks.items() if peak > ROOM * largest}
    if not near:
        return []
    return [
        f"activations of {len(near)} modules come near {largest:.5g}, the largest number of {dtype}; longer or other "
        "texts may overflow:\n" + _named(near)
    ]


def _named(peaks: Mapping[str, float]) -> str:
    order = sorted(peaks.items(), key=lambda item: -item[1])
    return listed([f"{name or 'the model'}: {peak:.4g}" for name, peak in order])
