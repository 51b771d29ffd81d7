"""Small JSON files: read as objects, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_deploy.errors import OutputError, PeftDeployError


def read_object(path: Path, error: type[PeftDeployError]) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: the file.
        error: what to raise when it cannot be read, or holds something else.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as exc:
        raise error(f"{path} cannot be read: {exc}") from exc
    if not isinstance(data, dict):
        raise error(f"{path} holds a {type(data).__name__}, not an object")
    return data


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes ``data`` the way the reference does (indent 2, keys sorted), by renaming a temporary
    file.

    Raises:
        OutputError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(data, indent=2, sort_keys=True), encoding="utf-8")
        temporary.replace(path)
    except OSError as exc:
        raise OutputError(f"{path} cannot be written: {exc}") from exc
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> Path:
    """The folder, made when it is missing.

    Raises:
        OutputError: the path is a file, or the folder cannot be made.
    """
    if folder.is_file():
        raise OutputError(f"{folder} is a file; a folder is needed to save to")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise OutputError(f"the folder {folder} cannot be made: {exc}") from exc
    return folder
