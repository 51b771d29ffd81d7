"""The parity check for test suites: a function to call, and a plugin for pytest.

Owns how a check becomes tests. Imports from the workflows; nothing but the command line lies below. With a bundle
that holds a recorded reference it needs neither Paddle nor the base model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft_deploy.base import BaseModel
    from peft_deploy.parity import ParityReport
    from peft_deploy.workflows.sources import Adapters

__all__ = ["assert_parity"]


def assert_parity(
    bundle: str | Path,
    base: str | Path | BaseModel | None = None,
    adapter: Adapters = None,
    *,
    provider: str = "cpu",
    seed: int = 0,
    cases: str | Path | None = None,
    report: str | Path | None = None,
) -> ParityReport:
    """Passes when a bundle computes what it was made of.

    Args:
        bundle: the bundle's folder.
        base: the base model's folder; None for the reference that was recorded in the bundle.
        adapter: the folders of the adapters that the bundle was made with, if any.
        provider: what runs the bundle, ``"cpu"`` or ``"cuda"``.
        seed: of the random tokens.
        cases: a file of prompts that are to be checked, too.
        report: a folder for the report as JSON, Markdown, JUnit XML and HTML.

    Returns:
        What was found.

    Raises:
        AssertionError: the bundle computes something else; the message names the places.
        PeftDeployError: the check could not be made; see :func:`peft_deploy.validate`.

    Example:
        >>> def test_my_bundle():
        ...     assert_parity("bundle/", report="parity/")
    """
    __tracebackhide__ = True
    from peft_deploy.parity.table import explain_report
    from peft_deploy.workflows.parity_reports import save_reports
    from peft_deploy.workflows.validate import validate

    found = validate(bundle, base, adapter=adapter, provider=provider, seed=seed, cases=cases)
    if report is not None:
        save_reports(report, bundle, found)
    if not found.passed:
        raise AssertionError(explain_report(found))
    return found
