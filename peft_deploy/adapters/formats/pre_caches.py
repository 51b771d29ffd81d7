"""``pre_caches.npy``: the keys and values of a prefix, [L, 2, K, P, D], beside its weights."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np

from peft_deploy.adapters.formats.state_file import stored_form
from peft_deploy.errors import AdapterError, OutputError
from peft_deploy.weights.source import DTYPES, Array

PRE_CACHES_NAME = "pre_caches.npy"
# How far the file may lie from the values computed anew, relative to the largest of them: two
# orders of summation in float32; in the narrow types, a projection that was rounded at every step.
TOLERANCE = {"float64": 1e-6, "float32": 1e-5, "float16": 1e-2, "bfloat16": 6e-2}


def write_pre_caches(folder: Path, caches: Array) -> Path:
    """Writes the file as the reference does; it appears whole or not at all.

    Args:
        folder: the prefix's.
        caches: [L, 2, K, P, D]; bfloat16 is written as its bit patterns, as Paddle does.

    Raises:
        OutputError: it cannot be written.
    """
    target = folder / PRE_CACHES_NAME
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            np.save(file, stored_form(PRE_CACHES_NAME, caches), allow_pickle=False)
        temporary.replace(target)
    except OSError as exc:
        raise OutputError(f"{target} cannot be written: {exc}") from exc
    finally:
        temporary.unlink(missing_ok=True)
    return target


def read_pre_caches(file: Path, dtype: str) -> Array:
    """The contents of the file.

    Args:
        file: to be read.
        dtype: element type of the prefix; needed to tell bit patterns of bfloat16.

    Raises:
        AdapterError: it is damaged, or no array of numbers.
    """
    try:
        caches: Array = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as exc:
        raise AdapterError(f"{file} cannot be read: {exc}") from exc
    return caches.view(DTYPES["bfloat16"]) if _is_bits(caches, dtype) else caches


def check_pre_caches(file: Path, computed: Array, dropout: float) -> None:
    """Compares the file with what the weights give.

    paddlenlp writes the file with dropout applied when the model is in training mode; such a file
    is recognized, reported by a warning, and the weights count.

    Args:
        file: ``pre_caches.npy``.
        computed: what the weights give.
        dropout: the prefix's dropout.

    Raises:
        AdapterError: the file says something else.
    """
    stored = read_pre_caches(file, computed.dtype.name)
    if stored.shape != computed.shape or stored.dtype.kind not in "fV":
        raise AdapterError(
            f"{file} holds {stored.dtype} {list(stored.shape)}; "
            f"the weights beside it give {computed.dtype} {list(computed.shape)}",
            hint="remove it if it is of another prefix; it can be computed from the weights",
        )
    found, wanted = stored.astype(np.float64), computed.astype(np.float64)
    allowed = TOLERANCE[computed.dtype.name] * float(np.abs(wanted).max(initial=0.0))
    if _largest(found - wanted) <= allowed:
        return
    kept = found != 0
    scaled = wanted / (1 - dropout)
    if dropout and _largest((found - scaled)[kept]) <= allowed / (1 - dropout):
        warnings.warn(
            f"{file} was saved in training mode: {1 - kept.mean():.0%} of it are zeros of the "
            "dropout. It is not used; the weights beside it are",
            stacklevel=3,
        )
        return
    raise AdapterError(
        f"{file} differs from what the weights beside it give, by up to "
        f"{_largest(found - wanted):.3g}, where {allowed:.3g} would be rounding",
        hint="remove it if it is of another prefix; it can be computed from the weights",
    )


def _largest(difference: Array) -> float:
    """The largest absolute value; NaN where there is one, which no comparison lets pass."""
    return float(np.abs(difference).max(initial=0.0))


def _is_bits(caches: Array, dtype: str) -> bool:
    return dtype == "bfloat16" and caches.dtype == np.uint16
