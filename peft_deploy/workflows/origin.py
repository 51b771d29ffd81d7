"""Whether a bundle was made of the base model and the adapters that it is to be compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_deploy.bundle import Manifest
from peft_deploy.errors import AdapterError, CheckpointError
from peft_deploy.workflows.check_adapters import check_adapter_origin
from peft_deploy.workflows.check_prefixes import check_prefix_origin
from peft_deploy.workflows.sources import ExportSource

if TYPE_CHECKING:
    pass


def check_origin(manifest: Manifest, source: ExportSource) -> None:
    """Passes when a bundle was made of this base model and this adapter.

    Raises:
        CheckpointError: it was made of another base model.
        AdapterError: it was made with another adapter, or with none.
    """
    recorded = manifest.base["fingerprint"]
    if source.fingerprint() != recorded:
        raise CheckpointError(
            f"the bundle was made of the base model {manifest.base.get('name')} with fingerprint "
            f"{recorded[:12]}; {source.name} has {source.fingerprint()[:12]}",
            hint="give the base model that the bundle was exported from",
        )
    check_prefix_origin(manifest, source)
    if source.kept:
        check_adapter_origin(manifest, source)
    merged = [entry for entry in manifest.adapters if entry.get("mode") == "merged"]
    if source.adapter is None:
        if merged:
            names = ", ".join(str(entry["name"]) for entry in merged)
            raise AdapterError(
                f"the bundle has the adapter {names} merged into it, and none was given",
                hint="add --adapter with the folder of that adapter",
            )
        return
    fingerprint = source.adapter.adapter.fingerprint
    if not merged:
        raise AdapterError(
            f"the bundle was made without an adapter; {source.adapter.name} was given",
            hint="leave --adapter out",
        )
    if fingerprint not in [entry["fingerprint"] for entry in merged]:
        recorded = ", ".join(f"{e['name']} ({e['fingerprint'][:12]})" for e in merged)
        raise AdapterError(
            f"the bundle was made with the adapter {recorded}; {source.adapter.name} has the "
            f"fingerprint {fingerprint[:12]}",
            hint="give the very adapter that the bundle was exported with",
        )
