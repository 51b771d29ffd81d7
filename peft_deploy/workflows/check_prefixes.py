"""Checks the prefixes of a bundle against the prefix models that they were trained in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from peft_deploy.adapters.formats.detect import AdapterFormat
from peft_deploy.adapters.formats.onnx_file import read_onnx_file
from peft_deploy.bundle import Manifest
from peft_deploy.bundle.adapter_files import adapter_path
from peft_deploy.bundle.prefixes import prefix_path, read_prefix_file
from peft_deploy.parity.bisect import Activation
from peft_deploy.parity.prefixed import PrefixedRunner
from peft_deploy.parity.report import ParityReport
from peft_deploy.progress import Progress, Silent
from peft_deploy.runtime import OnnxRunner, Runner, open_runner
from peft_deploy.runtime.exact_arithmetic import exact_arithmetic
from peft_deploy.runtime.loaded_adapter import read_for_slots
from peft_deploy.signature import POSITION_IDS
from peft_deploy.workflows.bisect import searched
from peft_deploy.workflows.check_extras import CheckExtras
from peft_deploy.workflows.prefixes import NamedPrefix, prefix_entries
from peft_deploy.workflows.sources import ExportSource, Mismatch

IN_SLOTS = " in slots"  # at the end of a report's title

if TYPE_CHECKING:
    from paddle import nn

    from peft_deploy.parity.prefix_reference import PrefixReference


@exact_arithmetic()
def check_prefixes(
    report: ParityReport,
    folder: Path,
    model: nn.Layer,
    source: ExportSource,
    *,
    provider: str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
    extras: CheckExtras | None = None,
) -> ParityReport:
    """The report with one part for every prefix, and one more where it fills slots.

    Args:
        report: of the bundle without a prefix.
        folder: the bundle, sealed or not.
        model: in the dynamic graph, without a prefix, LoRA active; left as it was.
        source: the model and the prefixes as they were trained.
        provider: what runs the bundle.
        seed: of the random tokens.
        progress: gets phases.
        extras: what the check covers beyond its usual cases.
    """
    # Here, because of what validate imports in turn.
    from peft_deploy.workflows.check_bundle import check_runner

    parts = dict(report.parts)
    for named in source.prefixes:
        reference = _reference(model, named, source)
        positions = source.family.dims(source.config).max_positions - named.prefix.num_tokens
        for title, runner in prefix_runners(folder, named.name, provider).items():
            (progress or Silent()).phase(f"Preparing the check with {title}")
            part = check_runner(
                folder,
                reference,
                runner,
                positions,
                provider=provider,
                seed=seed,
                progress=progress,
                extras=extras,
            )
            if report.finding is None and all(p.finding is None for p in parts.values()):
                active = _active(folder, named, in_slots=title.endswith(IN_SLOTS))
                part = searched(
                    part, folder, reference, source, extras, active=active, progress=progress
                )
            parts[title] = part
    return replace(report, parts=parts)


def prefix_runners(folder: Path, name: str, provider: str) -> dict[str, Runner]:
    """The ways in which the bundle takes a prefix, from its own files.

    Args:
        folder: the bundle.
        name: of the prefix.
        provider: what runs the bundle.

    Returns:
        Title in a report → what runs the bundle so.
    """
    manifest = Manifest.read(folder)
    fingerprint = manifest.base["fingerprint"]
    runner = open_runner(folder, manifest.signature, provider=provider)
    prefix = read_prefix_file(prefix_path(folder, name), manifest.signature, fingerprint)
    title = f"prefix {name}"
    runners: dict[str, Runner] = {title: PrefixedRunner(runner, prefix)}
    path = adapter_path(folder, name)
    if isinstance(runner, OnnxRunner) and path.is_file():
        loaded = read_for_slots(path, name, runner.slots, folder, fingerprint, provider)
        runners[f"{title}{IN_SLOTS}"] = runner.with_slots(loaded.values())
    return runners


def _active(folder: Path, named: NamedPrefix, *, in_slots: bool) -> Activation:
    """The prefix as the bundle has it, and as an export would write it."""
    manifest = Manifest.read(folder)
    if in_slots:
        file = read_onnx_file(adapter_path(folder, named.name))
        wanted = named.prefix.slots(positions=POSITION_IDS in manifest.signature.input_names)
        return Activation(slots=file.tensors, wanted=wanted)
    fingerprint = manifest.base["fingerprint"]
    prefix = read_prefix_file(prefix_path(folder, named.name), manifest.signature, fingerprint)
    return Activation(prefix=prefix, wanted=named.prefix.past)


def _reference(model: nn.Layer, named: NamedPrefix, source: ExportSource) -> PrefixReference:
    from peft_deploy.adapters.lora import LoRAModel
    from peft_deploy.adapters.prefix import PrefixModelForCausalLM
    from peft_deploy.parity.prefix_reference import PrefixReference

    inner = model.model if isinstance(model, LoRAModel) else model
    frozen = [(p, p.stop_gradient) for p in inner.parameters()]
    prefixed = PrefixModelForCausalLM(inner, replace(named.adapter.config, dtype=None))
    prefixed.set_state_dict(dict(named.adapter.state))
    prefixed.eval()
    for parameter, stop_gradient in frozen:
        parameter.stop_gradient = stop_gradient
    offset = named.prefix.position_offset
    reference = PrefixReference(prefixed, source.family, source.config, position_offset=offset)
    reference.check_forward(own_positions=named.format is AdapterFormat.PADDLE)
    return reference


def prefix_mismatches(manifest: Manifest, source: ExportSource) -> list[Mismatch]:
    """Where the prefixes that were given are not exactly those of a bundle."""
    recorded = {entry["name"]: entry["fingerprint"] for entry in prefix_entries(manifest.adapters)}
    given = {named.name: named.adapter.fingerprint for named in source.prefixes}
    known = ", ".join(recorded) or "none"
    by_name = "name each as the bundle does: --adapter NAME=DIR" if recorded else "leave it out"
    return [
        *(
            (f"the bundle has no prefix {name}; its prefixes: {known}", by_name)
            for name in given
            if name not in recorded
        ),
        *(
            (
                f"the bundle's prefix {name} has the fingerprint {recorded[name][:12]}; the one that was given has "
                f"{given[name][:12]}",
                "give the very prefix that the bundle was exported with",
            )
            for name in given
            if name in recorded and given[name] != recorded[name]
        ),
        *(
            (
                f"the bundle has the prefix {name}, which was not given",
                "add --adapter NAME=DIR with its folder",
            )
            for name in recorded
            if name not in given
        ),
    ]
