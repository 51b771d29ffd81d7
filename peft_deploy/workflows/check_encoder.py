"""Checks the encoder of a bundle of two graphs by itself, as any encoder is checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_deploy.bundle import Manifest
from peft_deploy.families import EncoderDecoderFamily, Family
from peft_deploy.parity.encoder_cases import EncoderSizes
from peft_deploy.parity.report import ParityReport
from peft_deploy.progress import Progress
from peft_deploy.runtime import open_encoder
from peft_deploy.workflows.check_extras import CheckExtras

if TYPE_CHECKING:
    from paddle import nn

PART = "the encoder alone"  # in a report


def check_encoder(
    report: ParityReport,
    folder: Path,
    model: nn.Layer,
    family: Family,
    config: Mapping[str, Any],
    *,
    provider: str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
    extras: CheckExtras | None = None,
) -> ParityReport:
    """The report with one part for the encoder; as it was for a model of one graph.

    Args:
        report: of both graphs together.
        folder: the bundle, sealed or not.
        model: in the dynamic graph, its adapter active and not merged; left as it was.
        family: of the model.
        config: the base model's config.json.
        provider: what runs the bundle.
        seed: of the random tokens.
        progress: gets phases.
        extras: what the check covers beyond its usual cases; prompts are no matter of an encoder's.
    """
    if not isinstance(family, EncoderDecoderFamily):
        return report
    # Here, because of what validate imports in turn, and because it needs Paddle.
    from peft_deploy.parity.reference import PaddleReference
    from peft_deploy.workflows.check_bundle import check_runner

    part = check_runner(
        folder,
        PaddleReference(model, family, config, encoder=True),
        open_encoder(folder, Manifest.read(folder), provider=provider),
        family.dims(config).max_positions,
        encoder=EncoderSizes.of(family, config),
        provider=provider,
        seed=seed,
        progress=progress,
        extras=None if extras is None else replace(extras, own=()),
    )
    return replace(report, parts={**report.parts, PART: part})
