"""Checkpoints of a training run: which one to resume from, and whether it fits."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_deploy.errors import CheckpointError, ConfigError, listed
from peft_deploy.training.options import RESUME_LATEST
from peft_deploy.weights._pickle_machine import PickleMachine

RECORD = "train_options.json"  # what a run was made with; in its folder and in every checkpoint
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Written by the Trainer beside the adapter, in this order.
STATE, OPTIMIZER, SCHEDULER = "trainer_state.json", "optimizer.pdopt", "scheduler.pdparams"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, the oldest first."""
    found = [
        (int(match.group(1)), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := CHECKPOINT.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(found)]


def find_checkpoint(resume: str | Path, output: Path, record: Mapping[str, Any]) -> Path:
    """The checkpoint to resume from.

    Args:
        resume: its folder, or ``"auto"`` for the latest one in ``output``.
        output: the run's folder.
        record: what the run is made with.

    Raises:
        CheckpointError: there is none, it is incomplete, or one of its files would run code.
        ConfigError: the record differs from that of the run that wrote it.
    """
    if str(resume) == RESUME_LATEST:
        there = checkpoints(output)
        if not there:
            raise CheckpointError(
                f"{output} holds no checkpoint to resume from",
                hint="--save-steps writes them; leave --resume out to start anew",
            )
        folder = there[-1]
    else:
        folder = Path(resume)
    needed = (RECORD, STATE, OPTIMIZER, SCHEDULER)
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} is no checkpoint of a training: no {', '.join(missing)}")
    _compare(folder, record)
    for name in (OPTIMIZER, SCHEDULER):
        refuse_code(folder / name)
    return folder


def refuse_code(path: Path) -> None:
    """Makes sure that a pickle holds nothing but tensors and plain containers.

    Raises:
        CheckpointError: it names anything else, or is damaged.
    """
    try:
        with path.open("rb") as file:
            PickleMachine(file, path).run()
    except OSError as exc:
        raise CheckpointError(f"{path} cannot be read: {exc.strerror or exc}") from exc


def _compare(checkpoint: Path, record: Mapping[str, Any]) -> None:
    then = _read(checkpoint / RECORD)
    now = json.loads(json.dumps(record))  # tuples become lists, as in the file
    different = [
        f"{key}: {then.get(key)!r} then, {now.get(key)!r} now"
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key)
    ]
    if different:
        raise ConfigError(
            f"{checkpoint} was made with other options:\n" + listed(different),
            hint="resume with the options of the first run, or start anew in another folder",
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
        if not isinstance(data, dict):
            raise ValueError(f"a JSON {type(data).__name__}, not an object")
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{path} cannot be read: {exc}") from exc
    return data
