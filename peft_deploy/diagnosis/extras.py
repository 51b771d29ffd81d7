"""This distribution's extras, and how much of each is installed."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

from peft_deploy.diagnosis.versions import Requirement, canonical_name, fits

DISTRIBUTION = "peft-deploy"
BASE = "base"
# The extras that users install, each with the packages whose presence says that it is wanted. What
# else an extra lists (numpy<2, pandas<3) may be there for other reasons.
MARKS: dict[str, tuple[str, ...]] = {
    BASE: (),
    "cpu": ("onnxruntime",),
    "gpu": ("onnxruntime-gpu",),
    "paddle": ("paddlepaddle", "paddlepaddle-gpu", "paddlenlp", "paddle2onnx"),
}
# Distributions that install the same module as another one and may stand in for it.
SUBSTITUTES = {"paddlepaddle": "paddlepaddle-gpu"}
# Nobody's direct requirement, but part of what goes wrong.
ALSO_OF_INTEREST = ("onnx", "ml-dtypes", "protobuf", "polygraphy", "onnxoptimizer")


@dataclass(frozen=True)
class PackageState:
    """One requirement and what is installed of it.

    Args:
        requirement: as the metadata has it.
        name: of the distribution that is, or should be, there.
        version: None when it is missing.
    """

    requirement: Requirement
    name: str
    version: str | None

    @property
    def fits(self) -> bool:
        """Whether it is there in a version that the requirement admits."""
        return self.version is not None and fits(self.version, self.requirement.bounds)


@dataclass(frozen=True)
class ExtraState:
    """One extra.

    Args:
        name: ``base`` for what is always needed.
        packages: its requirements.
        wanted: whether a package of its own is installed, so that the rest should be too.
    """

    name: str
    packages: tuple[PackageState, ...]
    wanted: bool

    @property
    def faults(self) -> tuple[PackageState, ...]:
        """What is missing, or there in a version that does not fit."""
        return tuple(package for package in self.packages if not package.fits)

    @property
    def complete(self) -> bool:
        """Whether everything is there."""
        return not self.faults

    @property
    def command(self) -> str:
        """The pip command that installs what is missing."""
        if not self.wanted:
            return f"pip install '{DISTRIBUTION}[{self.name}]'"
        names = " ".join(f"'{package.requirement}'" for package in self.faults)
        return f"pip install {names}"


def installed_packages(names: Sequence[str]) -> dict[str, str]:
    """Distribution → version, for those of the names that are installed."""
    versions = {canonical_name(name): _version(name) for name in names}
    return {name: version for name, version in versions.items() if version is not None}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def own_requirements() -> tuple[Requirement, ...]:
    """What this distribution says it needs under the Python that runs."""
    lines = metadata.requires(DISTRIBUTION) or ()
    found = (Requirement.parse(line) for line in lines)
    python = ".".join(platform.python_version_tuple()[:2])  # what a marker's python_version means
    return tuple(r for r in found if fits(python, r.python))


def names_of_interest(requirements: Sequence[Requirement]) -> list[str]:
    """Every distribution whose version matters."""
    of_extras = [r.name for r in requirements if (r.extra or BASE) in MARKS]
    marks = [name for names in MARKS.values() for name in names]
    return list(dict.fromkeys([DISTRIBUTION, *of_extras, *marks, *ALSO_OF_INTEREST]))


def read_extras(
    requirements: Sequence[Requirement], installed: Mapping[str, str]
) -> dict[str, ExtraState]:
    """Each extra of :data:`MARKS`, by name.

    Args:
        requirements: this distribution's.
        installed: distribution → version.
    """
    return {
        extra: ExtraState(
            extra,
            tuple(_state(r, installed) for r in requirements if (r.extra or BASE) == extra),
            extra == BASE or any(mark in installed for mark in marks),
        )
        for extra, marks in MARKS.items()
    }


def _state(requirement: Requirement, installed: Mapping[str, str]) -> PackageState:
    name = requirement.name
    if name not in installed and SUBSTITUTES.get(name) in installed:
        name = SUBSTITUTES[name]
    return PackageState(requirement, name, installed.get(name))
