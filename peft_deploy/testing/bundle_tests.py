"""A bundle's check as a list of tests, each with a verdict of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from peft_deploy.bundle import Manifest
from peft_deploy.parity.case_result import CaseResult
from peft_deploy.parity.cases import Case
from peft_deploy.parity.generation import Prompt
from peft_deploy.parity.generation_result import PromptResult
from peft_deploy.parity.report import ParityReport
from peft_deploy.parity.table import explain_case, explain_divergence
from peft_deploy.workflows.parity_reports import save_reports
from peft_deploy.workflows.recorded_reference import check_recorded, read_recordings
from peft_deploy.workflows.validate import validate

TEXT = "greedy text"


@dataclass(frozen=True)
class BundleTest:
    """One case, or the text after one prompt.

    Args:
        part: of the report; empty for the bundle itself.
        name: unique in the bundle.
        index: of the case or of the prompt in its part.
        is_text: which of the two it is.
    """

    part: str
    name: str
    index: int
    is_text: bool


class BundleTests:
    """The tests of one bundle. The check itself is made once, when the first verdict is asked for.

    With a base model even the names of the cases depend on the model: there the check is made for them.

    Args:
        bundle: the bundle's folder.
        base: the base model's folder; None for the recorded reference.
        adapters: folders of the adapters that it was made with.
        provider: what runs the bundle.
        report: a folder for the report.
    """

    def __init__(
        self,
        bundle: Path,
        base: str | None = None,
        adapters: Sequence[str] = (),
        provider: str = "cpu",
        report: Path | None = None,
    ) -> None:
        self.bundle = bundle
        self._base = base
        self._adapters = tuple(adapters)
        self._provider = provider
        self._report_folder = report

    @cached_property
    def report(self) -> ParityReport:
        """What the check found.

        Raises:
            PeftDeployError: the check could not be made.
        """
        if self._base is None and not self._adapters:
            recordings = read_recordings(self.bundle, self._manifest)
            found = check_recorded(
                self.bundle, self._manifest, recordings, provider=self._provider
            )
        else:
            found = validate(
                self.bundle, self._base, adapter=self._adapters or None, provider=self._provider
            )
        if self._report_folder is not None:
            save_reports(self._report_folder, self.bundle, found)
        return found

    @cached_property
    def _manifest(self) -> Manifest:
        return Manifest.read(self.bundle)

    def __iter__(self) -> Iterator[BundleTest]:
        """Every test, without repeating a name."""
        seen: Counter[str] = Counter()
        for part, (cases, prompts) in self._contents().items():
            names = [*(c.name for c in cases), *(f"{TEXT}: {_text(p)}" for p in prompts)]
            for i, name in enumerate(names):
                full = f"{part}: {name}" if part else name
                seen[full] += 1
                full = full if seen[full] == 1 else f"{full} ({seen[full]})"
                is_text = i >= len(cases)
                yield BundleTest(part, full, i - len(cases) if is_text else i, is_text)

    def problem(self, test: BundleTest) -> str | None:
        """Why a test fails; None when it passes."""
        report = self.report.parts[test.part] if test.part else self.report
        if not test.is_text:
            case = report.cases[test.index]
            return None if case.passed else explain_case(case)
        generation = report.generation
        if generation is None or generation.problem is not None:
            return "no text" if generation is None else generation.problem
        prompt = generation.prompts[test.index]
        return None if prompt.passed else explain_divergence(prompt)

    def _contents(
        self,
    ) -> Mapping[str, tuple[Sequence[Case | CaseResult], Sequence[Prompt | PromptResult]]]:
        """Part → its cases and prompts."""
        if self._base is None and not self._adapters:
            recordings = read_recordings(self.bundle, self._manifest)
            return {r.title: (r.expectation.matrix.cases, r.prompts) for r in recordings}
        return {
            title: (report.cases, report.generation.prompts if report.generation else ())
            for title, report in {"": self.report, **self.report.parts}.items()
        }


def _text(prompt: Prompt | PromptResult) -> str:
    return repr(prompt.text if isinstance(prompt, Prompt) else prompt.prompt)
