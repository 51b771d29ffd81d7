"""Checks a bundle of a model that no family knows. Needs Paddle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from peft_deploy.base import BaseModel
from peft_deploy.bundle import Manifest
from peft_deploy.config.layer_signature import LayerSignature
from peft_deploy.errors import AdapterError, CheckpointError
from peft_deploy.parity.report import ParityReport
from peft_deploy.progress import Progress
from peft_deploy.workflows.export_layer import check_bundle_of_layer
from peft_deploy.workflows.layer_source import LayerSource, layer_source
from peft_deploy.workflows.sources import Adapters

if TYPE_CHECKING:
    from paddle import nn


def validate_layer(
    folder: Path,
    manifest: Manifest,
    base: str | Path | BaseModel | nn.Layer,
    adapter: Adapters,
    *,
    provider: str,
    seed: int,
    progress: Progress,
) -> ParityReport:
    """Checks a bundle against the layer, or the folder, that it was made of.

    Args:
        folder: the bundle.
        manifest: its manifest, which says what the layer's user said of it.
        base: the layer, a LoRA model around it, or the folder.
        adapter: for a folder, the adapter that was merged.
        provider: what runs the bundle.
        seed: of the random inputs.
        progress: gets a phase for each step.

    Raises:
        CheckpointError: the weights are not those that the bundle was made of.
        AdapterError: likewise the adapter.
    """
    assert manifest.layer is not None
    signature = LayerSignature.from_dict(manifest.layer, f"the manifest of {folder}")
    source = layer_source(base, signature, adapter, None, progress)
    progress.phase("Comparing fingerprints")
    _check_origin(manifest, source)
    return check_bundle_of_layer(folder, source, provider=provider, seed=seed, progress=progress)


def _check_origin(manifest: Manifest, source: LayerSource) -> None:
    recorded, found = manifest.base["fingerprint"], source.base_fingerprint()
    if found != recorded:
        raise CheckpointError(
            f"the bundle was made of {manifest.base['name']} with fingerprint {recorded[:12]}; this "
            f"{type(source.inner).__name__} has {found[:12]}",
            hint="give the model that the bundle was exported from",
        )
    wanted = [entry["fingerprint"] for entry in manifest.adapters]
    adapter = source.adapter
    given = [] if adapter is None else [adapter.fingerprint]
    if given != wanted:
        names = ", ".join(f"{e['name']} ({e['fingerprint'][:12]})" for e in manifest.adapters)
        raise AdapterError(
            f"the bundle was made with {names or 'no adapter'}; "
            f"{f'one with fingerprint {given[0][:12]}' if given else 'none'} was given",
            hint="give the very adapter that the bundle was exported with"
            if wanted
            else "leave the adapter out",
        )
