"""Whether a bundle was made of the base model and the adapters that it is to be compared with."""

from __future__ import annotations

from peft_deploy.bundle import Manifest
from peft_deploy.errors import AdapterError, CheckpointError, listed
from peft_deploy.workflows.check_adapters import adapter_mismatches
from peft_deploy.workflows.check_prefixes import prefix_mismatches
from peft_deploy.workflows.sources import ExportSource, Mismatch


def check_origin(manifest: Manifest, source: ExportSource) -> None:
    """Passes when a bundle was made of this base model and these adapters.

    Raises:
        CheckpointError: it was made of another base model.
        AdapterError: it was made with other adapters; the message names all that are missing or wrong.
    """
    recorded = manifest.base["fingerprint"]
    if source.fingerprint() != recorded:
        raise CheckpointError(
            f"the bundle was made of the base model {manifest.base.get('name')} with fingerprint "
            f"{recorded[:12]}; {source.name} has {source.fingerprint()[:12]}",
            hint="give the base model that the bundle was exported from",
        )
    found = [
        *_merged_mismatches(manifest, source),
        *adapter_mismatches(manifest, source),
        *prefix_mismatches(manifest, source),
    ]
    if found:
        sentences, hints = [sentence for sentence, _ in found], dict.fromkeys(h for _, h in found)
        raise AdapterError(
            sentences[0]
            if len(found) == 1
            else f"the bundle was not made with what was given:\n{listed(sentences)}",
            hint="; ".join(hints),
        )


def _merged_mismatches(manifest: Manifest, source: ExportSource) -> list[Mismatch]:
    merged = [entry for entry in manifest.adapters if entry.get("mode") == "merged"]
    if source.adapter is None:
        return [
            (
                f"the bundle has the adapter {entry['name']} merged into it, and none was given",
                "add --adapter with the folder of that adapter",
            )
            for entry in merged
        ]
    given, fingerprint = source.adapter.name, source.adapter.adapter.fingerprint
    if not merged:
        return [
            (
                f"the bundle was made without an adapter that is merged; {given} was given",
                "leave that --adapter out",
            )
        ]
    if fingerprint in [entry["fingerprint"] for entry in merged]:
        return []
    recorded = ", ".join(f"{e['name']} ({e['fingerprint'][:12]})" for e in merged)
    return [
        (
            f"the bundle was made with the adapter {recorded}; {given} has the fingerprint "
            f"{fingerprint[:12]}",
            "give the very adapter that the bundle was exported with",
        )
    ]
