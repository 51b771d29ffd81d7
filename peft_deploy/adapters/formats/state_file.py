"""The one file of an adapter's weights: finding it in a folder, reading and writing it.

Not about any method's tensors; those are checked by the modules of the formats.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from peft_deploy.errors import AdapterError, OutputError, listed
from peft_deploy.weights import FLOATING, open_checkpoint
from peft_deploy.weights.source import DTYPES, Array

PICKLE_PROTOCOL = 4  # what paddle.save writes
INDEX_SUFFIX = ".index.json"


def with_variant(name: str, variant: str | None) -> str:
    """The file name with the variant before its extension."""
    stem, _, extension = name.rpartition(".")
    return f"{stem}.{variant}.{extension}" if variant else name


def find_state_file(folder: Path, names: Sequence[str], ranks: re.Pattern[str], hint: str) -> Path:
    """The one file of weights in an adapter's folder.

    Args:
        folder: to look into.
        names: what the file may be called; an index and its only shard may both be there.
        ranks: matches the names of files that hold the part of a single parallel rank.
        hint: what to do with files of single ranks.

    Raises:
        AdapterError: there is none, more than one, or only parts of single ranks.
    """
    present = [name for name in names if (folder / name).is_file()]
    present = [name for name in present if name + INDEX_SUFFIX not in present]
    if len(present) == 1:
        return folder / present[0]
    if present:
        raise AdapterError(
            f"{folder} holds more than one set of adapter weights:\n{listed(present)}",
            hint="remove all but one",
        )
    parts = [entry.name for entry in folder.iterdir() if ranks.fullmatch(entry.name)]
    if parts:
        raise AdapterError(
            f"{folder} holds the adapter in pieces of single parallel ranks:\n{listed(parts)}",
            hint=hint,
        )
    raise AdapterError(f"{folder} has no adapter weights. Looked for:\n{listed(names)}")


def read_state(file: Path) -> dict[str, Array]:
    """All tensors of a file of weights, by name.

    Raises:
        AdapterError: a tensor that does not hold floating-point numbers, NaN or infinity.
        CheckpointError: the file is damaged, or would run code.
    """
    checkpoint = open_checkpoint(file)
    strange = [n for n in checkpoint.names() if checkpoint.info(n).dtype not in FLOATING]
    if strange:
        raise AdapterError(
            f"{file} holds tensors that are not floating-point numbers:\n"
            + listed(f"{name}: {checkpoint.info(name).dtype}" for name in strange)
        )
    state = {name: checkpoint.read(name) for name in checkpoint.names()}
    broken = [name for name, array in state.items() if not np.isfinite(array).all()]
    if broken:
        raise AdapterError(
            f"{file} holds NaN or infinity in:\n{listed(broken)}",
            hint="the training may have diverged; use an earlier checkpoint",
        )
    return state


def write_state(file: Path, tensors: Mapping[str, Array]) -> None:
    """Writes a ``.pdparams`` file as paddle.save does; it appears whole or not at all.

    Raises:
        OutputError: it cannot be written.
        AdapterError: a tensor does not hold floating-point numbers.
    """
    state = {name: stored_form(name, array) for name, array in tensors.items()}
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as opened:
            pickle.dump(state, opened, protocol=PICKLE_PROTOCOL)
        temporary.replace(file)
    except OSError as exc:
        raise OutputError(f"{file} cannot be written: {exc}") from exc
    finally:
        temporary.unlink(missing_ok=True)


def stored_form(name: str, array: Array) -> Array:
    """What Paddle hands to numpy: bfloat16 as its bit patterns, all else as it is.

    Raises:
        AdapterError: not floating-point numbers.
    """
    if array.dtype.name not in FLOATING:
        raise AdapterError(
            f"{name} has the type {array.dtype}; an adapter holds floating-point numbers"
        )
    values = np.ascontiguousarray(array)
    return values.view(np.uint16) if values.dtype == DTYPES["bfloat16"] else values
