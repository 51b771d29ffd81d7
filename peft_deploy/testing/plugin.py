"""The pytest plugin: ``pytest --peft-deploy-bundle PATH`` makes a test of every case and every prompt.

Imports nothing of this package before a bundle is given, so that it costs other test runs nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from peft_deploy.testing.bundle_tests import BundleTest, BundleTests

_BUNDLE = "--peft-deploy-bundle"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options of the plugin."""
    group = parser.getgroup("peft-deploy", "parity of exported bundles")
    group.addoption(
        _BUNDLE,
        action="append",
        default=[],
        metavar="PATH",
        help="a bundle to check, against its recorded reference; repeatable",
    )
    group.addoption(
        "--peft-deploy-base",
        metavar="DIR",
        help="check against this base model in Paddle instead (the check runs during collection)",
    )
    group.addoption(
        "--peft-deploy-adapter",
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="an adapter that the bundle was made with, beside --peft-deploy-base; repeatable",
    )
    group.addoption(
        "--peft-deploy-provider", choices=["cpu", "cuda"], default="cpu", help="what runs it"
    )
    group.addoption(
        "--peft-deploy-report",
        metavar="DIR",
        help="write report.json, report.md, junit.xml and report.html; a folder each of several bundles",
    )


def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Adds the tests of the bundles that were given."""
    bundles = [Path(text) for text in config.getoption(_BUNDLE)]
    if not bundles:
        return
    from peft_deploy.errors import PeftDeployError
    from peft_deploy.testing.bundle_tests import BundleTests

    for bundle in bundles:
        report = config.getoption("--peft-deploy-report")
        if report is not None:
            report = Path(report, bundle.resolve().name) if len(bundles) > 1 else Path(report)
        tests = BundleTests(
            bundle,
            config.getoption("--peft-deploy-base"),
            config.getoption("--peft-deploy-adapter"),
            config.getoption("--peft-deploy-provider"),
            report,
        )
        try:
            items.extend(_item(session, tests, test) for test in tests)
        except PeftDeployError as exc:
            hint = f"\n{exc.hint}" if exc.hint else ""
            raise pytest.UsageError(f"{exc.message}{hint}") from exc


def _item(session: pytest.Session, tests: BundleTests, test: BundleTest) -> pytest.Item:
    item: pytest.Item = ParityItem.from_parent(
        session,
        name=test.name,
        nodeid=f"{tests.bundle}::{test.name}",
        tests=tests,
        test=test,
    )
    return item


class ParityMismatchError(AssertionError):
    """A case or a text that is not the reference's."""


class ParityItem(pytest.Item):
    """One case of a bundle's check, or the text after one prompt.

    Args:
        tests: of the bundle.
        test: which of them.
        options: pytest's own.
    """

    def __init__(self, *, tests: BundleTests, test: BundleTest, **options: Any) -> None:
        super().__init__(**options)
        self._tests = tests
        self._test = test

    def runtest(self) -> None:
        """Fails when the case or the text is not the reference's.

        Raises:
            ParityMismatchError: with the place and both values.
        """
        problem = self._tests.problem(self._test)
        if problem is not None:
            raise ParityMismatchError(problem)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """A sentence instead of a traceback, where the check came to its end."""
        from peft_deploy.errors import PeftDeployError

        if isinstance(excinfo.value, (ParityMismatchError, PeftDeployError)):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        """Where it comes from, and its title."""
        return self._tests.bundle, None, self.nodeid
