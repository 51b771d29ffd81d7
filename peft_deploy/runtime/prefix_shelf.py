"""The prefixes of a bundle by name, read when they are first asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peft_deploy.bundle.manifest import Manifest
from peft_deploy.bundle.prefixes import Prefix, prefix_path, read_prefix_file
from peft_deploy.errors import AdapterError
from peft_deploy.runtime.runner import Array

# A name, a file, one that was read already, or cache input → [1, K, P, D].
AnyPrefix = str | Path | Prefix | Mapping[str, Array]


class PrefixShelf:
    """Reads each prefix once; any number of threads may use it.

    Args:
        folder: of the bundle.
        manifest: of the bundle.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self._manifest = manifest
        self._read: dict[str, Prefix] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Of the bundle's own prefixes."""
        return tuple(
            str(entry["name"])
            for entry in self._manifest.adapters
            if entry.get("method") == "prefix"
        )

    def find(self, prefix: AnyPrefix | None) -> Prefix | Mapping[str, Array] | None:
        """A prefix by its name in the bundle, or from a file; anything else is given back as it is.

        Raises:
            AdapterError: there is no such prefix, or it is damaged, of another base model, or does not fit the
                graph.
        """
        if not isinstance(prefix, str | Path):
            return prefix
        key = str(prefix)
        if key not in self._read:
            self._read[key] = self._load(prefix)
        return self._read[key]

    def _load(self, prefix: str | Path) -> Prefix:
        path = Path(prefix).expanduser()
        if isinstance(prefix, str) and prefix in self.names:
            path = prefix_path(self._folder, prefix)
        elif not path.exists():
            own = ", ".join(self.names)
            raise AdapterError(
                f"there is no prefix {str(prefix)!r}, neither in {self._folder} nor as a file",
                hint=f"the bundle has {own}"
                if own
                else "prefixes come into a bundle by: peft-deploy export --adapter NAME=DIR",
            )
        return read_prefix_file(
            path,
            self._manifest.signature,
            str(self._manifest.base.get("fingerprint") or ""),
            self._manifest.context_length,
        )
