"""Options of a merge."""

from __future__ import annotations

import re
from dataclasses import dataclass

from peft_deploy.errors import ConfigError

LAYOUTS = ("paddle", "hf")
DTYPES = ("float32", "float16", "bfloat16")
DEFAULT_SHARD_SIZE = "5GB"
# Decimal and binary multiples, as Hugging Face's and PaddleNLP's own options of this name have them.
_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """How a merged checkpoint is written.

    Args:
        to: ``"paddle"`` (PaddleNLP's names, linear weights [in, out]) or ``"hf"`` (Hugging Face's, [out, in]);
            the base model's own when None.
        dtype: of the floating-point tensors; each keeps its own when None.
        max_shard_size: of the data in one file, bytes or a text such as ``"5GB"`` or ``"512MiB"``.
        force: replace a merged checkpoint that is there.

    Raises:
        ConfigError: a value that cannot be used.
    """

    to: str | None = None
    dtype: str | None = None
    max_shard_size: int | str = DEFAULT_SHARD_SIZE
    force: bool = False

    def __post_init__(self) -> None:
        if self.to not in (None, *LAYOUTS):
            raise ConfigError(f"the layout {self.to!r} is none of {', '.join(LAYOUTS)}")
        if self.dtype not in (None, *DTYPES):
            raise ConfigError(f"the type {self.dtype!r} is none of {', '.join(DTYPES)}")
        _ = self.max_shard_bytes

    @property
    def max_shard_bytes(self) -> int:
        """``max_shard_size`` in bytes."""
        return parse_size(self.max_shard_size)


def parse_size(size: int | str) -> int:
    """A number of bytes from ``5000000000``, ``"5GB"`` (10⁹ each) or ``"5GiB"`` (2³⁰ each).

    Raises:
        ConfigError: neither, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*((?:[KMG]i?)?B)?\s*", str(size), re.IGNORECASE)
    count = int(float(match[1]) * _UNITS[(match[2] or "B").upper()]) if match else 0
    if isinstance(size, bool) or count < 1:
        raise ConfigError(f"{size!r} is no size; write it like 5GB, 500MB or 2GiB")
    return count
