"""What has to be made before anything can be measured, and is kept until what it was made of changes.

A build is a command that writes a folder. Beside the folder lies what the command took, and a stamp of the command, of
the files that it read and of the software that it ran.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from measured_process import Measured, run_measured

OUTPUT = "{output}"  # in a command: the folder that it writes
TAIL_LINES = 12  # of the output of a command that failed


@dataclass(frozen=True)
class Build:
    """One folder and how it is made.

    Args:
        key: the folder's name.
        command: with :data:`OUTPUT` in it.
        reads: folders that it reads.
        software: what identifies the software that it runs.
    """

    key: str
    command: tuple[str, ...]
    reads: tuple[Path, ...]
    software: str


class BuildError(Exception):
    """A command failed; the message is the end of what it printed."""


class Workshop:
    """The folder of all builds.

    Args:
        root: where it is.
        environment: of the commands.
    """

    def __init__(self, root: Path, environment: Mapping[str, str]) -> None:
        self.root, self._environment = root, environment
        root.mkdir(parents=True, exist_ok=True)

    def folder(self, key: str) -> Path:
        """Where a build's folder is."""
        return self.root / key

    def make(self, build: Build) -> Measured:
        """Makes it unless it is there and up to date; gives what making it took, then or now.

        Raises:
            BuildError: the command failed; the next call does not try again, unless something has changed.
        """
        stamp, record = _stamp(build), self.root / f"{build.key}.json"
        known = json.loads(record.read_text("utf-8")) if record.is_file() else {}
        if known.get("stamp") == stamp:
            if "error" in known:
                raise BuildError(known["error"])
            if self.folder(build.key).is_dir():
                return Measured(**known["took"])
        say(f"building {build.key}")
        record.unlink(missing_ok=True)
        try:
            took = self.run(build, self.folder(build.key))
        except BuildError as exc:
            record.write_text(json.dumps({"stamp": stamp, "error": str(exc)}), "utf-8")
            raise
        record.write_text(json.dumps({"stamp": stamp, "took": asdict(took)}), "utf-8")
        return took

    def time_again(self, build: Build) -> Measured:
        """Makes it once more, into a folder that is thrown away, to see what that takes.

        Raises:
            BuildError: the command failed.
        """
        scratch = self.root / "again"
        try:
            return self.run(build, scratch)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def run(self, build: Build, output: Path) -> Measured:
        """Runs the command with this folder, which is emptied first, as its output."""
        shutil.rmtree(output, ignore_errors=True)
        command = [str(output) if part == OUTPUT else part for part in build.command]
        try:
            return run_measured(command, env=self._environment, cwd=self.root)
        except subprocess.CalledProcessError as exc:
            shutil.rmtree(output, ignore_errors=True)
            lines = exc.output.decode("utf-8", "replace").strip().splitlines()
            raise BuildError("\n".join(lines[-TAIL_LINES:])) from None


def say(line: str) -> None:
    """A line for whoever waits."""
    print(line, file=sys.stderr, flush=True)


def sources_of(package: Path) -> str:
    """What identifies a Python package that is worked on: a hash of its files."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def _stamp(build: Build) -> str:
    parts: Sequence[object] = (build.command, build.software, [_state(f) for f in build.reads])
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _state(folder: Path) -> list[tuple[str, int, int]]:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
