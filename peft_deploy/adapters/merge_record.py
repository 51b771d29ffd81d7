"""What a merged checkpoint says of itself, so that no adapter is merged into it twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from peft_deploy.errors import AdapterError, CheckpointError

MERGE_RECORD_NAME = "peft_deploy_merge.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class MergedAdapter:
    """One adapter that a checkpoint holds.

    Args:
        name: what it was called.
        method: ``lora``.
        fingerprint: identifies its tensors and its scaling.
        rank: R.
        scaling: what A · B was multiplied by.
        targets: modules whose weights it changed.
        replaced: parameters that it replaced.
        base_fingerprint: of the weights that it was merged into.
    """

    name: str
    method: str
    fingerprint: str
    rank: int
    scaling: float
    targets: tuple[str, ...]
    replaced: tuple[str, ...]
    base_fingerprint: str


@dataclass(frozen=True, kw_only=True)
class MergeRecord:
    """The contents of ``peft_deploy_merge.json``.

    Args:
        base: where the base model came from: ``name``, ``layout`` and ``fingerprint``.
        adapters: all that the weights hold, in the order in which they were merged.
        fingerprint: of the merged weights.
        layout: ``huggingface`` or ``paddlenlp``.
        dtype: of most of the weights.
        rounding_loss: parameter → the part of its change that rounding to float16 or bfloat16 lost, as a
            quotient of norms, in the last merge; empty when nothing was rounded to these.
        versions: package → version.
        format_version: of this file's form.
    """

    base: Mapping[str, Any]
    adapters: tuple[MergedAdapter, ...]
    fingerprint: str
    layout: str
    dtype: str
    rounding_loss: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def load(cls, folder: Path) -> MergeRecord | None:
        """What the folder of a base model says; None when nothing says that it was merged.

        Raises:
            CheckpointError: the file is damaged or of a newer version.
        """
        path = folder / MERGE_RECORD_NAME
        if not path.is_file():
            return None
        try:
            data: dict[str, Any] = json.loads(path.read_text("utf-8"))
            if data["format_version"] > FORMAT_VERSION:
                raise CheckpointError(
                    f"{path} has format_version {data['format_version']}; "
                    f"this release reads up to {FORMAT_VERSION}",
                    hint="update peft-deploy",
                )
            data["adapters"] = tuple(_adapter(entry) for entry in data["adapters"])
            return cls(**data)
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise CheckpointError(f"{path} cannot be read: {exc}") from exc

    def check_absent(self, fingerprint: str, *, base: str, adapter: str) -> None:
        """Passes when an adapter is not among those that the weights hold.

        Args:
            fingerprint: the adapter's.
            base: what to call the checkpoint in the error.
            adapter: what to call the adapter.

        Raises:
            AdapterError: it was merged into them before.
        """
        for merged in self.adapters:
            if merged.fingerprint == fingerprint:
                raise AdapterError(
                    f"{base} already holds the adapter {adapter}: its {MERGE_RECORD_NAME} names the "
                    f"fingerprint {fingerprint[:12]}, merged into it as {merged.name}",
                    hint="leave the adapter out, or give the base model that it was trained on",
                )


def _adapter(entry: dict[str, Any]) -> MergedAdapter:
    known = {f.name for f in fields(MergedAdapter)}
    values = {key: value for key, value in entry.items() if key in known}
    return MergedAdapter(
        **{
            **values,
            "targets": tuple(values["targets"]),
            "replaced": tuple(values["replaced"]),
        }
    )
