"""The errors that users can meet, one class for each stage, with the exit code of the command line.

    PeftDeployError                      1
    ├── ConfigError                      2  options, configuration files
    │   ├── MissingExtraError            2  a package that an extra would have installed
    │   └── OutputError                  2  the output folder cannot be used
    ├── CheckpointError                  3  a base model's files
    │   └── AdapterError                 3  an adapter's files, or an adapter that does not fit
    ├── TraceError                       4  dynamic graph → static program
    │   └── UnsupportedModelError        4  no family claims the model, or it is refused by name
    ├── ConversionError                  5  static program → ONNX → bundle
    │   ├── UnsupportedOperatorError     5  found by the preflight, before the converter runs
    │   └── ConverterCrashError          5  the converter's process died
    ├── BundleError                      6  a bundle on disk is not what its manifest says
    ├── ExecutionError                   6  the graph does not run
    └── ParityError                      7  it runs, and computes something else

Every message says what failed, the value at fault and what would have been right; ``hint`` says what to do next.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any


class PeftDeployError(Exception):
    """Base of every error that this package raises on purpose.

    Args:
        message: what failed, the value at fault, what would have been right.
        hint: what the user can do next, one sentence.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(PeftDeployError):
    """An option or a configuration file has a value that cannot be used."""

    exit_code = 2


class MissingExtraError(ConfigError):
    """A package is not installed that belongs to one of the extras of this distribution."""


class OutputError(ConfigError):
    """The place to write to cannot be used: not empty, not writable, full."""


class CheckpointError(PeftDeployError):
    """A base model's files are missing, damaged or inconsistent."""

    exit_code = 3


class AdapterError(CheckpointError):
    """An adapter's files are damaged, or it does not belong to the model it is applied to."""


class TraceError(PeftDeployError):
    """The dynamic graph could not be turned into a static program."""

    exit_code = 4


class UnsupportedModelError(TraceError):
    """No family claims this model, or its family refuses this configuration by name."""


class ConversionError(PeftDeployError):
    """The static program could not be turned into a bundle."""

    exit_code = 5


class UnsupportedOperatorError(ConversionError):
    """The traced program holds operators that the converter cannot translate, or translates wrongly."""


class ConverterCrashError(ConversionError):
    """The process around paddle2onnx ended without a result; its log is in the message."""


class BundleError(PeftDeployError):
    """A bundle's files do not agree with its manifest."""

    exit_code = 6


class ExecutionError(PeftDeployError):
    """The exported graph does not run, or got inputs that it cannot take."""

    exit_code = 6


class ParityError(PeftDeployError):
    """The exported model runs, and its results are not those of the reference.

    Args:
        message: see :class:`PeftDeployError`.
        hint: see :class:`PeftDeployError`.
        report: the check's report, a ``peft_deploy.parity.ParityReport``, when the check came to its end.
    """

    exit_code = 7

    def __init__(self, message: str, *, hint: str | None = None, report: Any = None) -> None:
        super().__init__(message, hint=hint)
        self.report = report


MAX_LISTED = 10  # names in one list of a message; the rest is counted


def listed(names: Iterable[str], limit: int = MAX_LISTED) -> str:
    """The names sorted, one a line, cut after ``limit`` with a count of the rest."""
    ordered = sorted(names)
    lines = [f"  {name}" for name in ordered[:limit]]
    if len(ordered) > limit:
        lines.append(f"  … and {len(ordered) - limit} more")
    return "\n".join(lines)


def nearest(name: str, known: Collection[str], limit: int = 3) -> list[str]:
    """The members of ``known`` that look most like ``name``, best first; empty when none is close."""
    import difflib

    return difflib.get_close_matches(name, known, n=limit, cutoff=0.5)
