"""The folder that a training run writes to."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peft_deploy.errors import OutputError, listed
from peft_deploy.training.checkpoints import CHECKPOINT, RECORD

METRICS = "metrics.jsonl"
# A checkpoint is written under this name, and renamed when it is complete.
PARTIAL = ".checkpoint.partial"
_OURS = (
    re.compile(r"prefix_model_state.*\.pdparams|prefix_config\.json|pre_caches\.npy"),
    re.compile(r"lora_model_state.*\.pdparams|lora_config\.json|peft_deploy_adapter\.json"),
    re.compile(r"config\.json|generation_config\.json|runs"),
    re.compile("|".join(map(re.escape, (RECORD, METRICS, PARTIAL)))),
    CHECKPOINT,
)


def check_output(folder: Path, *, resume: bool, force: bool) -> None:
    """Checks the folder before anything is loaded.

    Raises:
        OutputError: it holds something and is neither to be resumed nor replaced, or it is to be
            replaced and holds what no training run has written.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; the adapter needs a folder")
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if not there or resume:
        return
    if not force:
        raise OutputError(
            f"{folder} is not empty; it holds {', '.join(there[:8])}",
            hint="give another --output, replace it with --force, or go on with --resume",
        )
    foreign = [name for name in there if not _is_ours(name)]
    if foreign:
        raise OutputError(
            f"{folder} is not replaced, because it holds files of no training run:\n"
            f"{listed(foreign)}",
            hint="remove them yourself, or give another --output",
        )


def clear_output(folder: Path) -> None:
    """Removes what earlier runs have written into the folder; nothing else."""
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        if _is_ours(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_lines(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """A JSONL file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in entries), "utf-8")
        temporary.replace(path)
    except OSError as exc:
        raise OutputError(f"{path} cannot be written: {exc}") from exc
    finally:
        temporary.unlink(missing_ok=True)


def _is_ours(name: str) -> bool:
    return any(pattern.fullmatch(name) for pattern in _OURS)
