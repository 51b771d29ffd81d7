"""A bundle while it is being made."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from peft_deploy import atomic_folder
from peft_deploy.atomic_folder import AtomicFolder, FolderKind, disk_errors, nearest_existing
from peft_deploy.bundle.manifest import MANIFEST, Manifest

__all__ = ["BUNDLE", "BundleFolder", "check_output", "disk_errors", "nearest_existing", "sha256"]

BUNDLE = FolderKind("bundle", MANIFEST)
_HASH_BLOCK = 1 << 20


class BundleFolder(AtomicFolder):
    """A temporary folder beside the output that takes its place when the bundle is complete.

    Args:
        output: where the bundle is to appear.
        force: replace a bundle that is there.

    Raises:
        OutputError: there is something at ``output`` that must not be replaced, or its parent cannot be written.
    """

    def __init__(self, output: Path, *, force: bool = False) -> None:
        super().__init__(output, BUNDLE, force=force)

    def hashes(self, known: Mapping[str, str]) -> dict[str, str]:
        """File → SHA-256, for everything but the manifest.

        Args:
            known: hashes that were computed while writing.
        """
        files = sorted(p for p in self.path.rglob("*") if p.is_file() and p.name != MANIFEST)
        names = {str(path.relative_to(self.path)): path for path in files}
        return {name: known.get(name) or sha256(path) for name, path in names.items()}

    def seal(self, manifest: Manifest) -> None:
        """Writes the manifest, the last file of a bundle."""
        self.write_text(MANIFEST, manifest.to_json())


def check_output(output: Path, *, force: bool) -> None:
    """Fails when something lies at ``output`` that an export must not replace."""
    atomic_folder.check_output(output, BUNDLE, force=force)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's contents, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()
