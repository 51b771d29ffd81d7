"""The reference's side of a check, kept in a bundle and used again without Paddle or the base model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from peft_deploy.atomic_folder import disk_errors
from peft_deploy.bundle import BundleFolder, Manifest
from peft_deploy.bundle.folder import sha256
from peft_deploy.config.export import RUNTIME
from peft_deploy.errors import BundleError, listed
from peft_deploy.families import describe_unread
from peft_deploy.parity.gate import check_expectation
from peft_deploy.parity.recording import (
    FOLDER,
    SUFFIX,
    Recording,
    read_recording,
    write_recording,
)
from peft_deploy.parity.report import ParityReport
from peft_deploy.progress import Progress, Silent
from peft_deploy.runtime import Runner, Session, open_encoder, open_runner
from peft_deploy.runtime.exact_arithmetic import exact_arithmetic
from peft_deploy.workflows.check_adapters import PART
from peft_deploy.workflows.check_encoder import PART as ENCODER_PART
from peft_deploy.workflows.check_prefixes import prefix_runners
from peft_deploy.workflows.prefixes import prefix_entries

_BUNDLE = "bundle"  # the file of the bundle itself, beside those of its parts


def keep_recordings(
    folder: BundleFolder,
    manifest: Manifest,
    report: ParityReport,
    recordings: Sequence[Recording],
) -> Manifest:
    """Writes what the reference said into a bundle.

    Args:
        folder: the bundle, while it is being made.
        manifest: of the bundle.
        report: of the check that was recorded; its parts give the recordings their titles.
        recordings: of the bundle itself and then of each part.

    Returns:
        The manifest with the files' hashes.

    Raises:
        OutputError: a file cannot be written.
    """
    with disk_errors(folder.output):
        (folder.path / FOLDER).mkdir(exist_ok=True)
    files = {}
    for i, (title, recording) in enumerate(zip(["", *report.parts], recordings, strict=True)):
        slug = re.sub(r"[^\w.-]+", "-", title) if title else _BUNDLE
        name = f"{FOLDER}/{i}-{slug}{SUFFIX}"
        write_recording(folder.path / name, replace(recording, title=title))
        files[name] = sha256(folder.path / name)
    return replace(manifest, files={**manifest.files, **files})


def read_recordings(folder: Path, manifest: Manifest) -> list[Recording]:
    """What was recorded with a bundle, the bundle itself first.

    Args:
        folder: the bundle.
        manifest: of the bundle.

    Raises:
        BundleError: nothing was recorded, or a file is missing or not what the manifest says.
    """
    names = sorted(n for n in manifest.files if n.startswith(f"{FOLDER}/") and n.endswith(SUFFIX))
    if not names:
        raise BundleError(
            f"{folder} holds no recorded reference, so it can only be compared with the model "
            "that it was made of",
            hint="give --base (and --adapter), or export again with --record-reference",
        )
    wrong = [n for n in names if not _intact(folder / n, manifest.files[n])]
    if wrong:
        raise BundleError(
            f"the recorded reference of {folder} is missing, or not the one that the manifest "
            f"describes:\n{listed(wrong)}",
            hint="get the bundle again, or export it again",
        )
    return [read_recording(folder / name) for name in names]


@exact_arithmetic()
def check_recorded(
    folder: Path,
    manifest: Manifest,
    recordings: Sequence[Recording],
    *,
    provider: str = "cpu",
    progress: Progress | None = None,
) -> ParityReport:
    """Checks a bundle against what was recorded with it.

    Args:
        folder: the bundle.
        manifest: of the bundle.
        recordings: from :func:`read_recordings`.
        provider: what runs the bundle.
        progress: gets phases.

    Raises:
        BundleError: something was recorded that the bundle does not have.
    """
    runners = _runners(folder, manifest, provider)
    if unknown := [r.title for r in recordings if r.title not in runners]:
        raise BundleError(
            f"{folder} has a recorded reference for parts that it does not have:\n{listed(unknown)}"
        )
    reports = {
        recording.title: check_expectation(
            recording.expectation,
            runners[recording.title],
            recording.prompts,
            recording.judge,
            options=replace(recording.options, provider=provider),
            progress=progress or Silent(),
        )
        for recording in recordings
    }
    whole = replace(reports.pop(""), parts=reports)
    unread = manifest.base.get("unread", {})
    return whole.with_warnings(describe_unread(unread, manifest.architecture))


def _runners(folder: Path, manifest: Manifest, provider: str) -> Mapping[str, Runner]:
    """What runs the bundle and each of its parts, from its own files."""
    runners: dict[str, Runner] = {
        "": open_runner(folder, manifest.signature, provider=provider),
    }
    if manifest.encoder is not None:
        runners[ENCODER_PART] = open_encoder(folder, manifest, provider=provider)
    for entry in prefix_entries(manifest.adapters):
        runners |= prefix_runners(folder, str(entry["name"]), provider)
    kept = [str(e["name"]) for e in manifest.adapters if e.get("mode") == RUNTIME]
    if kept:
        session = Session(folder, provider=provider)
        for name in kept:
            session.load_adapter(name)
            runners[PART.format(name)] = session.runner(name)
    return runners


def _intact(path: Path, known: str) -> bool:
    return path.is_file() and sha256(path) == known
