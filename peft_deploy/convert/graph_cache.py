"""Graphs that were traced and converted before, kept between exports.

A graph without weights depends on the model's configuration, on the packages that trace and convert it, and on nothing
else; so the second adapter of a base is not converted again, and needs no Paddle unless it is checked. Entries lie in
``~/.cache/peft-deploy`` (``XDG_CACHE_HOME`` moves it), or in the folder that ``PEFT_DEPLOY_CACHE`` names; if that is
empty, none are kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from peft_deploy.atomic_folder import make_temporary, remove_temporary

CACHE_VARIABLE = "PEFT_DEPLOY_CACHE"
HASHES_FILE = "hashes.json"
MOST_ENTRIES = 100  # of a few megabytes each
_PACKAGES = ("paddlepaddle", "paddlepaddle-gpu", "paddlenlp", "paddle2onnx", "numpy")


def cache_folder() -> Path | None:
    """Where graphs are kept; None when they are not to be."""
    named = os.environ.get(CACHE_VARIABLE)
    if named is not None:
        return Path(named).expanduser() / "graphs" if named else None
    caches = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(caches) if caches else Path.home() / ".cache") / "peft-deploy" / "graphs"
    except RuntimeError:  # a user without a home, as in some containers
        return None


class GraphCache:
    """The entry of one request.

    Args:
        request: what the converter's process is asked for.
    """

    def __init__(self, request: Mapping[str, Any]) -> None:
        folder = cache_folder()
        self._entry = folder and folder / _key(request)

    def take(self, folder: Path) -> bool:
        """Copies what was converted before into a folder, out of the reach of other processes.

        Args:
            folder: of this request; there.

        Returns:
            Whether there was an entry, and a whole one.
        """
        if self._entry is None:
            return False
        taken = folder / "cached"
        try:
            shutil.copytree(self._entry, taken)
            if json.loads((taken / HASHES_FILE).read_text("utf-8")) != _hashes(taken):
                return False
            with contextlib.suppress(OSError):  # of a cache that may only be read
                os.utime(self._entry)  # used last
            shutil.copytree(taken, folder, dirs_exist_ok=True)
        except (OSError, ValueError):  # shutil.Error is an OSError
            return False
        finally:
            shutil.rmtree(taken, ignore_errors=True)
        return True

    def keep(self, folder: Path, files: frozenset[str]) -> None:
        """Keeps what the process left, unless there is no place for it: that only costs the next export time.

        Args:
            folder: of the request.
            files: names of the files in it, and in folders in it, that are its result.
        """
        if self._entry is None:
            return
        with contextlib.suppress(OSError):
            self._entry.parent.mkdir(parents=True, exist_ok=True)
            made = make_temporary(self._entry.parent, ".new-")
            try:
                for path in (p for p in folder.rglob("*") if p.name in files):
                    target = made / path.relative_to(folder)
                    target.parent.mkdir(exist_ok=True)
                    shutil.copyfile(path, target)
                (made / HASHES_FILE).write_text(json.dumps(_hashes(made)), "utf-8")
                shutil.rmtree(self._entry, ignore_errors=True)  # it was not whole
                made.rename(self._entry)
            finally:
                remove_temporary(made)
            _forget_oldest(self._entry.parent)


def _key(request: Mapping[str, Any]) -> str:
    """Changes with everything that the graph depends on; our own code, and not its version, as it is developed."""
    software = {package: _version(package) for package in _PACKAGES}
    software["python"] = platform.python_version()
    own = hashlib.sha256()
    for path in _own_sources():
        own.update(path.name.encode() + path.read_bytes())
    described = {"request": request, "software": software, "own": own.hexdigest()}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _own_sources() -> list[Path]:
    return sorted(Path(__file__).resolve().parents[1].rglob("*.py"))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != HASHES_FILE)
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def _forget_oldest(folder: Path) -> None:
    entries = [path for path in folder.iterdir() if not path.name.startswith(".")]
    entries.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for path in entries[MOST_ENTRIES:]:
        shutil.rmtree(path, ignore_errors=True)
