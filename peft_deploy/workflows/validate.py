"""Checks a bundle against the model that it was made of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_deploy.base import BaseModel, open_base
from peft_deploy.base.folder import CONFIG
from peft_deploy.base.pooling import NO_POOLING
from peft_deploy.bundle import Manifest
from peft_deploy.config.export import LAST_LOGITS_IN_16_BITS, RUNTIME, check_layer_count
from peft_deploy.config.json_file import read_object
from peft_deploy.config.precision import PRECISIONS
from peft_deploy.environment import require_paddle
from peft_deploy.errors import BundleError, ConfigError
from peft_deploy.families import Pooling
from peft_deploy.parity.report import ParityReport
from peft_deploy.progress import Progress, Silent
from peft_deploy.workflows.bisect import check_bisectable, searched
from peft_deploy.workflows.bisect_layers import searched_in_layers
from peft_deploy.workflows.calibration import with_calibration_of
from peft_deploy.workflows.check_adapters import check_adapters
from peft_deploy.workflows.check_bundle import check_bundle
from peft_deploy.workflows.check_extras import CheckExtras, read_cases
from peft_deploy.workflows.check_layers import check_layers, plan_layers
from peft_deploy.workflows.check_loss import KnownText, add_loss, read_in_float32
from peft_deploy.workflows.check_prefixes import check_prefixes
from peft_deploy.workflows.check_weights import check_weights
from peft_deploy.workflows.origin import check_origin
from peft_deploy.workflows.recorded_reference import check_recorded, read_recordings
from peft_deploy.workflows.rounded_reference import load_stored
from peft_deploy.workflows.sources import Adapters, from_folders

if TYPE_CHECKING:
    from paddle import nn


def validate(
    bundle: str | Path,
    base: str | Path | BaseModel | nn.Layer | None = None,
    *,
    adapter: Adapters = None,
    provider: str = "cpu",
    seed: int = 0,
    cases: str | Path | None = None,
    bisect: str | Path | None = None,
    layers: int | str | None = None,
    progress: Progress | None = None,
) -> ParityReport:
    """Checks a bundle against the folders that it was made of. A bundle that fails is no error.

    Without a base model, what was recorded at the export takes its place; that needs no Paddle.

    Args:
        bundle: the bundle's folder.
        base: the base model's folder, or a name that PaddleNLP can download; None for the recorded reference. For
            a bundle of a layer, the layer or the ``LoRAModel`` around it.
        adapter: the folders of the adapters that the bundle was made with, if any.
        provider: what runs the bundle, ``"cpu"`` or ``"cuda"``.
        seed: of the random tokens.
        cases: a file of prompts that are to be checked, too: one a line, or a ``.jsonl`` of objects with a
            ``prompt`` or with ``ids``.
        bisect: a folder for the part of the graph that is at fault, should the bundle fail; the report then says
            where that is. Where the check computes with some layers only, the search takes the reference layer by
            layer, so that one of them is in memory at a time.
        layers: how many layers the check computes with, or ``"all"``; None computes with all where they fit into
            memory, and with as many as do otherwise.
        progress: is told about every phase.

    Raises:
        BundleError: the folder is no bundle, or not what its manifest says; or without a base model, nothing was
            recorded.
        ConfigError: the cases cannot be used; or without a base model, an adapter, a seed or cases were given; or the
            bundle has the logits of the last token alone, in 16 bits.
        CheckpointError: the base model is not the one that the bundle was made of.
        AdapterError: likewise the adapter.

    Example:
        >>> import peft_deploy
        >>> report = peft_deploy.validate("bundle/", "base/", adapter="adapter/")  # doctest: +SKIP
        >>> report.passed  # doctest: +SKIP
        True
    """
    check_layer_count(layers)
    folder, progress = Path(bundle).expanduser(), progress or Silent()
    manifest = Manifest.read(folder)
    if base is None:
        _check_recorded_options(adapter, seed, cases, bisect, layers)
        recordings = read_recordings(folder, manifest)
        return check_recorded(folder, manifest, recordings, provider=provider, progress=progress)
    _check_checkable(manifest)
    if bisect is not None:
        check_bisectable(manifest)
    if manifest.layer is not None:
        if cases is not None:
            raise ConfigError("cases are prompts, and the bundle is not of a language model")
        require_paddle("checking a bundle against its model")
        from peft_deploy.workflows.validate_layer import validate_layer

        return validate_layer(
            folder, manifest, base, adapter, provider=provider, seed=seed, progress=progress
        )
    if not isinstance(base, str | Path | BaseModel):
        raise ConfigError(
            f"a {type(base).__name__} in memory can only be checked against a bundle that was made of a layer",
            hint="give the base model's folder",
        )
    own = [] if cases is None else read_cases(Path(cases), folder)
    searched_for = None if bisect is None else Path(bisect)
    extras = CheckExtras(own, record=bisect is not None, bounded=False, bisect=searched_for)
    kept = any(entry.get("mode") == RUNTIME for entry in manifest.adapters)
    base = _as_exported(base, folder)
    source = from_folders(base, adapter, keep=kept)
    progress.phase("Comparing fingerprints")
    check_origin(manifest, source)
    source = with_calibration_of(folder, manifest, source)
    count = plan_layers(layers, source, manifest)
    if count is not None:
        report = check_layers(
            folder,
            source,
            base,
            count,
            provider=provider,
            seed=seed,
            progress=progress,
            extras=extras,
        )
        report = check_weights(report, folder, source, progress=progress)
        report = searched_in_layers(report, folder, source, base, extras, progress=progress)
        return report.with_warnings(source.limits_of_check)
    known: list[KnownText] = []
    model = load_stored(
        source,
        manifest.precision,
        progress,
        before=lambda model: known.append(read_in_float32(model, folder, source)),
    )
    options: dict[str, Any] = {
        "provider": provider,
        "seed": seed,
        "progress": progress,
        "extras": extras,
    }
    report = check_bundle(folder, model, source.family, source.config, **options)
    if searched_for is not None:
        from peft_deploy.parity.reference import PaddleReference

        reference = PaddleReference(model, source.family, source.config)
        report = searched(report, folder, reference, source, extras, progress=progress)
    report = check_weights(report, folder, source, progress=progress)
    report = check_prefixes(report, folder, model, source, **options)
    del model  # the check of an adapter loads a model of its own
    report = check_adapters(report, folder, source, **options)
    if known:
        report = add_loss(report, known[0], folder, provider=provider)
    return report.with_warnings(source.limits_of_check)


def _check_checkable(manifest: Manifest) -> None:
    if PRECISIONS[manifest.precision].in_16_bits and manifest.signature.last_logits:
        raise ConfigError(
            LAST_LOGITS_IN_16_BITS,
            hint="export the same model without --last-logits, and check that",
        )


def _check_recorded_options(
    adapter: Adapters,
    seed: int,
    cases: str | Path | None,
    bisect: str | Path | None,
    layers: int | str | None,
) -> None:
    given = {
        "an adapter": adapter is not None,
        "a seed": seed != 0,
        "cases": cases is not None,
        "bisect": bisect is not None,
        "a number of layers": layers is not None,
    }
    if wrong := [name for name, value in given.items() if value]:
        raise ConfigError(
            f"{wrong[0]} can only be used with the base model; without it the check is the one that was recorded",
            hint="add --base with the base model's folder",
        )


def _as_exported(base: str | Path | BaseModel, bundle: Path) -> BaseModel:
    """The base model, giving the sentence embeddings that the bundle gives."""
    path = bundle / CONFIG
    config = read_object(path, BundleError) if path.is_file() else {}
    pooling = Pooling.of(config) or NO_POOLING
    return base.pooled(pooling) if isinstance(base, BaseModel) else open_base(base, pooling)
