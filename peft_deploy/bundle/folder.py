"""A bundle while it is being made."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from peft_deploy.bundle.manifest import MANIFEST, Manifest
from peft_deploy.errors import OutputError

_HASH_BLOCK = 1 << 20


class BundleFolder:
    """A temporary folder beside the output that takes its place when it is complete.

    A context manager: leaving it without :meth:`commit` removes everything that was written. The output is
    never seen half-written, and with ``force`` the old one stays until the new one is ready.

    Args:
        output: where the bundle is to appear.
        force: replace a folder that is not empty.

    Raises:
        OutputError: there is something at ``output`` that must not be replaced, or its parent cannot be written.
    """

    def __init__(self, output: Path, *, force: bool = False) -> None:
        self.output = output
        self._force = force
        check_output(output, force=force)
        with disk_errors(output):
            output.parent.mkdir(parents=True, exist_ok=True)
            self.path = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
            self.path.chmod(0o755)

    def __enter__(self) -> BundleFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def write_text(self, name: str, text: str) -> None:
        """Writes a small file."""
        with disk_errors(self.output):
            (self.path / name).write_text(text, "utf-8")

    def copy(self, source: Path) -> None:
        """Copies a file under its own name."""
        with disk_errors(self.output):
            shutil.copyfile(source, self.path / source.name)

    def hashes(self) -> dict[str, str]:
        """File → SHA-256, for everything but the manifest."""
        files = sorted(p for p in self.path.rglob("*") if p.is_file() and p.name != MANIFEST)
        return {str(p.relative_to(self.path)): sha256(p) for p in files}

    def seal(self, manifest: Manifest) -> None:
        """Writes the manifest, the last file of a bundle."""
        self.write_text(MANIFEST, manifest.to_json())

    def commit(self) -> None:
        """Puts the folder in the output's place.

        Raises:
            OutputError: the output appeared meanwhile, or cannot be replaced.
        """
        check_output(self.output, force=self._force)
        with disk_errors(self.output):
            if not self.output.exists():
                self.path.rename(self.output)
                return
            old = Path(
                tempfile.mkdtemp(prefix=f".{self.output.name}.old.", dir=self.output.parent)
            )
            self.output.rename(old / "replaced")
            try:
                self.path.rename(self.output)
            except OSError:
                (old / "replaced").rename(self.output)
                raise
            finally:
                shutil.rmtree(old, ignore_errors=True)


def check_output(output: Path, *, force: bool) -> None:
    """Fails when something lies at ``output`` that an export must not replace."""
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
    if not (output / MANIFEST).exists():
        raise OutputError(
            f"--output {output} holds something that is not a bundle; --force replaces only bundles",
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


def sha256(path: Path) -> str:
    """The SHA-256 of a file's contents, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()
