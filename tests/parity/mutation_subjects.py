"""Good bundles of small models, and the check of broken copies of them.

What the reference says is measured once a bundle; a broken copy is held to it by the gate as it is, case matrix,
limits and generation, and then looked into as ``validate --bisect`` does.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from bundle_edits import Array
from made_bundles import BEHIND_PREFIX, BUNDLES, LORA, PREFIX, Exported

from peft_deploy.adapters.formats.onnx_file import read_onnx_file
from peft_deploy.bundle import Manifest
from peft_deploy.bundle.adapter_files import adapter_path
from peft_deploy.bundle.prefixes import Prefix, prefix_path, read_prefix_file
from peft_deploy.parity import ParityReport, Prompt, Scores, check_expectation, score_tokens
from peft_deploy.parity.bisect import Activation, Finding
from peft_deploy.parity.prefixed import PrefixedRunner
from peft_deploy.parity.recording import Recording
from peft_deploy.parity.reference import PaddleReference
from peft_deploy.progress import Silent
from peft_deploy.runtime import Runner, Session, open_runner
from peft_deploy.runtime.exact_arithmetic import exact_arithmetic
from peft_deploy.workflows.bisect import with_finding
from peft_deploy.workflows.check_bundle import check_bundle, check_runner
from peft_deploy.workflows.check_extras import CheckExtras
from peft_deploy.workflows.check_weights import check_weights
from peft_deploy.workflows.kept_adapters import kept_tensors
from peft_deploy.workflows.rounded_reference import load_stored
from peft_deploy.workflows.sources import EXPORT_DTYPE, ExportSource


@dataclass(frozen=True, eq=False)
class Verdict:
    """What the gate and the search say of a bundle.

    Args:
        report: the gate's.
        finding: the search's; None where it finds nothing or cannot look.
        files: what is wrong with the weights in the bundle's files, where no case fails; None where nothing is.
    """

    report: ParityReport
    finding: Finding | None
    files: str | None = None

    @property
    def used(self) -> float:
        """The largest error in units of its limit; infinite where the graph does not run."""
        if any(case.problem for case in self.report.cases):
            return math.inf
        assert self.report.worst is not None
        return self.report.worst[2].used


@dataclass(frozen=True, eq=False)
class Subject:
    """A good bundle and what it was made of.

    Args:
        name: one of :data:`made_bundles.SUBJECTS`.
        folder: the bundle.
        source: what it was made of.
        reference: the model that was trained.
        recording: what that says.
    """

    name: str
    folder: Path
    source: ExportSource
    reference: PaddleReference
    recording: Recording

    @cached_property
    def base(self) -> Mapping[str, Array]:
        """Weight of the graph → the base model's."""
        return {n: np.array(self.source.tensors.read(p)) for n, p in self._parameters().items()}

    @cached_property
    def merged(self) -> Mapping[str, Array]:
        """Weight of the graph → what an export writes."""
        source = self.source.merged(EXPORT_DTYPE)
        return {n: np.array(source.read(p)) for n, p in self._parameters().items()}

    def pair(self, weight: str) -> tuple[Array, Array, float]:
        """A [in, R], B [R, out] and the scaling of the adapter of a weight."""
        assert self.source.adapter is not None
        adapter = self.source.adapter.adapter
        module = self._parameters()[weight].removesuffix("weight")
        found = [
            next(v for n, v in adapter.state.items() if n.endswith(f"{module}lora_{m}"))
            for m in "AB"
        ]
        return found[0], found[1], adapter.config.scaling

    def _parameters(self) -> dict[str, str]:
        names = self.source.family.names(self.source.config)
        merged = self.source.merged(EXPORT_DTYPE)
        mapped = {p: names.to_huggingface(p) for p in merged.names()}
        return {m.name if m else p: p for p, m in mapped.items()}

    def copy_to(self, folder: Path) -> Path:
        """A copy to be broken."""
        shutil.copytree(self.folder, folder)
        return folder

    @exact_arithmetic()
    def runner(self, folder: Path) -> Runner:
        """What runs a copy as the check does, its adapter or prefix active."""
        if self.name == BEHIND_PREFIX:
            prefix = self.prefix(folder)
            return PrefixedRunner(open_runner(folder), prefix)
        if BUNDLES[self.name][1]:
            session = Session(folder)
            session.load_adapter(LORA)
            return session.runner(LORA)
        return open_runner(folder)

    def prefix(self, folder: Path) -> Prefix:
        """The prefix of a copy."""
        manifest = Manifest.read(folder)
        path = prefix_path(folder, PREFIX)
        return read_prefix_file(path, manifest.signature, manifest.base["fingerprint"])

    def adapter_file(self, folder: Path) -> Path:
        """The adapter of a copy."""
        return adapter_path(folder, LORA)

    def check(self, folder: Path, runner: Runner | None = None) -> ParityReport:
        """The gate's report of a copy."""

        def judge(prompt: Prompt, tokens: Any) -> Scores:
            return score_tokens(self.reference, prompt, tokens)

        kept = self.recording
        return check_expectation(
            kept.expectation,
            runner or self.runner(folder),
            kept.prompts,
            judge,
            options=kept.options,
        )

    def active(self, folder: Path) -> Activation:
        """What a copy has beside its graph."""
        if self.name == BEHIND_PREFIX:
            wanted = self.source.prefixes[0].prefix.past
            return Activation(prefix=self.prefix(folder), wanted=wanted)
        if not BUNDLES[self.name][1]:
            return Activation()
        file = read_onnx_file(self.adapter_file(folder))
        slots = Manifest.read(folder).graph["lora_slots"]
        wanted = kept_tensors(self.source.kept[0].adapter, self.source, slots)
        return Activation(slots=file.tensors, wanted=wanted)

    def judge(self, folder: Path, output: Path) -> Verdict:
        """The gate's report of a copy, and the search's if that fails."""
        report = self.check(folder)
        if report.passed:
            return Verdict(
                report, None, check_weights(report, folder, self.source).cases[-1].problem
            )
        expectation = self.recording.expectation
        found = with_finding(
            report, folder, self.reference, self.source, expectation, output, self.active(folder)
        )
        return Verdict(report, found.finding)


def read_subject(name: str, exported: Exported, seed: int = 0) -> Subject:
    """Reads the reference of a good bundle.

    Args:
        name: one of :data:`made_bundles.SUBJECTS`.
        exported: the bundle.
        seed: of the matrix's tokens.
    """
    folder, source = exported.bundle, exported.source()
    extras = CheckExtras(record=True, bounded=False)
    model = adapted_model(folder, source)
    family, config = source.family, source.config
    reference = PaddleReference(model, family, config)
    subject = Subject(name, folder, source, reference, Recording("", None, (), (), None))  # type: ignore[arg-type]
    if name == BEHIND_PREFIX:
        reference = behind_prefix(reference, source)
        positions = family.dims(config).max_positions - source.prefixes[0].prefix.num_tokens
        report = check_runner(
            folder, reference, subject.runner(folder), positions, seed=seed, extras=extras
        )
    else:
        runner = subject.runner(folder)
        report = check_bundle(
            folder, model, family, config, runner=runner, seed=seed, extras=extras
        )
    assert report.passed, report.summary()
    assert not report.warnings, report.warnings
    return replace(subject, reference=reference, recording=extras.recordings[0])


def adapted_model(bundle: Path, source: ExportSource) -> Any:
    """The model that a bundle is held to, with the numbers of its precision and the adapter active."""
    named = source.kept[0] if source.kept else None
    return load_stored(source, Manifest.read(bundle).precision, Silent(), named)


def behind_prefix(reference: PaddleReference, source: ExportSource) -> PaddleReference:
    """The reference with the prefix before every text."""
    from peft_deploy.adapters.prefix import PrefixModelForCausalLM
    from peft_deploy.parity.prefix_reference import PrefixReference

    named = source.prefixes[0]
    inner = reference.model.model
    prefixed = PrefixModelForCausalLM(inner, replace(named.adapter.config, dtype=None))
    prefixed.set_state_dict(dict(named.adapter.state))
    prefixed.eval()
    offset = named.prefix.position_offset
    return PrefixReference(prefixed, source.family, source.config, position_offset=offset)
