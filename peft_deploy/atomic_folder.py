"""A folder that appears whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from peft_deploy.errors import OutputError

Self = TypeVar("Self", bound="AtomicFolder")


# Temporary folders from before they are there: an interrupt may come before whoever made one can remove it again.
_unfinished: set[Path] = set()


def make_temporary(parent: Path, prefix: str, mode: int = 0o700) -> Path:
    """A new folder, which :func:`remove_temporary` removes.

    Args:
        parent: to make it in.
        prefix: of its name.
        mode: its permissions.

    Raises:
        OSError: it cannot be made.
    """
    path = parent / f"{prefix}{secrets.token_hex(8)}"
    _unfinished.add(path)
    try:
        path.mkdir()
        path.chmod(mode)
    except OSError:
        _unfinished.discard(path)
        raise
    return path


def remove_temporary(path: Path) -> None:
    """Removes what :func:`make_temporary` made, unless it has moved."""
    shutil.rmtree(path, ignore_errors=True)
    _unfinished.discard(path)


def remove_unfinished() -> None:
    """Removes every temporary folder of this process, before it ends in a hurry."""
    for path in list(_unfinished):
        remove_temporary(path)


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that this package writes, and so may replace.

    Args:
        noun: what to call one, ``"bundle"``.
        mark: the file that only such a folder has.
    """

    noun: str
    mark: str


class AtomicFolder:
    """A temporary folder beside the output that takes its place when it is complete.

    A context manager: leaving it without :meth:`commit` removes everything that was written. The output is
    never seen half-written, and with ``force`` the old one stays until the new one is ready.

    Args:
        output: where the folder is to appear.
        kind: what is being written; with ``force``, only a folder of this kind is replaced.
        force: replace a folder that is not empty.

    Attributes:
        path: the temporary folder, to write to.

    Raises:
        OutputError: there is something at ``output`` that must not be replaced, or its parent cannot be written.
    """

    def __init__(self, output: Path, kind: FolderKind, *, force: bool = False) -> None:
        self.output = output
        self.kind = kind
        self._force = force
        check_output(output, kind, force=force)
        with disk_errors(output):
            output.parent.mkdir(parents=True, exist_ok=True)
            self.path = make_temporary(output.parent, f".{output.name}.", 0o755)

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        remove_temporary(self.path)

    def require_space(self, size: int) -> None:
        """Fails when the disk has not ``size`` bytes left, before any of them is written.

        Raises:
            OutputError: with what is needed and what is free.
        """
        free = shutil.disk_usage(self.path).free
        if free < size:
            raise OutputError(
                f"no space left for {self.output}: it needs {size / 1e6:,.0f} MB, "
                f"{free / 1e6:,.0f} MB are free"
            )

    def write_text(self, name: str, text: str) -> None:
        """Writes a small file."""
        with disk_errors(self.output):
            (self.path / name).write_text(text, "utf-8")

    def copy(self, source: Path) -> None:
        """Copies a file under its own name."""
        with disk_errors(self.output):
            shutil.copyfile(source, self.path / source.name)

    def commit(self) -> None:
        """Puts the folder in the output's place.

        Raises:
            OutputError: the output appeared meanwhile, or cannot be replaced.
        """
        check_output(self.output, self.kind, force=self._force)
        with disk_errors(self.output):
            if not self.output.exists():
                self.path.rename(self.output)
                return
            old = Path(
                tempfile.mkdtemp(prefix=f".{self.output.name}.old.", dir=self.output.parent)
            )
            try:
                self.output.rename(old / "replaced")
                self.path.rename(self.output)
            except BaseException:  # Ctrl-C between the two would otherwise lose both
                if not self.output.exists():
                    (old / "replaced").rename(self.output)
                raise
            finally:
                shutil.rmtree(old, ignore_errors=True)


def check_output(output: Path, kind: FolderKind, *, force: bool) -> None:
    """Fails when something lies at ``output`` that must not be replaced.

    Raises:
        OutputError: a file or a link; a folder that is not empty, without ``force``; one of another kind, with it.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise OutputError(
            f"--output {output} is not a folder", hint="name a folder that does not exist yet"
        )
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not force:
        raise OutputError(
            f"--output {output} is not empty",
            hint="name another folder, or replace this one with --force",
        )
    if not (output / kind.mark).is_file():
        raise OutputError(
            f"--output {output} holds something that is not a {kind.noun}; "
            f"--force replaces only {kind.noun}s",
            hint="remove it yourself, or name another folder",
        )


@contextmanager
def disk_errors(output: Path) -> Iterator[None]:
    """Turns what the operating system says about writing into an :class:`OutputError`."""
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(nearest_existing(output)).free
            raise OutputError(
                f"no space left for {output}: {free / 1e6:.0f} MB are free; nothing was left behind"
            ) from exc
        raise OutputError(f"{output} cannot be written: {exc.strerror or exc}") from exc


def nearest_existing(path: Path) -> Path:
    """The path itself or the closest parent that exists."""
    path = Path(os.path.abspath(path))  # noqa: PTH100 (resolve() would follow links)
    while not path.exists():
        path = path.parent
    return path
