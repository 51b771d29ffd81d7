"""What a diagnosis found, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from peft_deploy.diagnosis.machine import Machine
from peft_deploy.errors import ConfigError

BASE_INSTALL = "base install"  # title of the checks of what everything else stands on
BROKEN = ConfigError.exit_code  # something that is installed cannot be used as it is


class Verdict(str, Enum):
    """How a check came out."""

    PASSED = "passed"
    FAILED = "failed"
    INFO = "info"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Args:
        title: what.
        verdict: how it came out; INFO neither passes nor fails.
        detail: what was found, one sentence.
        fix: what to do; for whatever failed, and where something may be added.
        exit_code: of the program when this check fails.
    """

    title: str
    verdict: Verdict
    detail: str
    fix: str | None = None
    exit_code: int = BROKEN

    @property
    def failed(self) -> bool:
        """Whether it failed."""
        return self.verdict is Verdict.FAILED

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        data = {**asdict(self), "verdict": self.verdict.value}
        if not self.failed:
            del data["exit_code"]
        return data


@dataclass(frozen=True)
class Diagnosis:
    """All that was found.

    Args:
        machine: the interpreter and the processor.
        packages: distribution → version, None for those that are not installed.
        extras: extra → whether it is complete.
        checks: in the order in which they were made.
    """

    machine: Machine
    packages: Mapping[str, str | None]
    extras: Mapping[str, bool]
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not any(check.failed for check in self.checks)

    @property
    def base_works(self) -> bool:
        """Whether the packages of the base install are there and can be imported."""
        return not any(check.failed and check.title == BASE_INSTALL for check in self.checks)

    @property
    def exit_code(self) -> int:
        """0 when nothing failed; a failed conversion's own code counts for more than the others'."""
        return max((check.exit_code for check in self.checks if check.failed), default=0)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {
            "passed": self.passed,
            "machine": asdict(self.machine),
            "packages": dict(self.packages),
            "extras": dict(self.extras),
            "checks": [check.to_dict() for check in self.checks],
        }
