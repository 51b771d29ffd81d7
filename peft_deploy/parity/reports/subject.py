"""What a report is about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peft_deploy.bundle import Manifest


@dataclass(frozen=True)
class Subject:
    """The bundle that was checked, and how its tokens are written.

    Args:
        name: of the bundle, for titles.
        model: architecture, precision and operator set, in words.
        created: when the bundle was made, in UTC.
        base: the base model's ``name``, ``layout`` and ``fingerprint``.
        adapters: the manifest's entries.
        versions: package → version of everything that made the bundle.
        files: file of the bundle → SHA-256.
        decode: gives the text of tokens; None where there is no tokenizer.
    """

    name: str
    model: str
    created: str
    base: Mapping[str, Any]
    adapters: Sequence[Mapping[str, Any]]
    versions: Mapping[str, str]
    files: Mapping[str, str]
    decode: Callable[[Sequence[int]], str] | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        name: str,
        manifest: Manifest,
        decode: Callable[[Sequence[int]], str] | None = None,
    ) -> Subject:
        """The subject that a manifest describes."""
        opset = "" if manifest.opset is None else f", opset {manifest.opset}"
        return cls(
            name=name,
            model=f"{manifest.architecture} ({manifest.model_type}), {manifest.precision}{opset}",
            created=manifest.created,
            base=manifest.base,
            adapters=manifest.adapters,
            versions=manifest.versions,
            files=manifest.files,
            decode=decode,
        )

    def token(self, token: int) -> str:
        """A token as readers know it: its text, or its number."""
        return str(token) if self.decode is None else self.decode([token])

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {
            "name": self.name,
            "model": self.model,
            "created": self.created,
            "base": dict(self.base),
            "adapters": [
                {k: v for k, v in entry.items() if k not in ("targets", "replaced")}
                for entry in self.adapters
            ],
            "versions": dict(self.versions),
            "files": dict(self.files),
        }
