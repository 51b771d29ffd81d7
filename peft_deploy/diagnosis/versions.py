"""Version numbers and requirements, as far as this distribution's own metadata goes."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Release, then an optional phase: 3.0.0b4, 1.17.0rc1, 2.0.0.post1, 3.4.0.dev20260101+cu126.
_VERSION = re.compile(
    r"v?(?P<release>\d+(?:\.\d+)*)(?:[-_.]?(?P<phase>a|alpha|b|beta|rc|c|dev|post)[-_.]?(?P<number>\d*))?.*",
    re.IGNORECASE,
)
_PHASES = {"dev": 0, "a": 1, "alpha": 1, "b": 2, "beta": 2, "rc": 3, "c": 3, "post": 5}
_FINAL = 4
_REQUIREMENT = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*?)\s*(?P<bounds>[<>=!~][^;]*?)?\s*(?:;\s*(?P<marker>.+))?"
)
_MARKER = re.compile(
    r"(?:python_version\s*(?P<operator>[<>=!]+)\s*['\"](?P<python>[\d.]+)['\"])?(?:\s+and\s+)?"
    r"(?:extra\s*==\s*['\"](?P<extra>[\w-]+)['\"])?"
)
_BOUND = re.compile(r"(==|!=|<=|>=|<|>)\s*([\w.+!-]+)")
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}

VersionKey = tuple[tuple[int, ...], int, int]


@dataclass(frozen=True)
class Requirement:
    """One package that something needs.

    Args:
        name: of the distribution, in lower case with hyphens.
        bounds: ``">=1.26"``, several with commas, or empty.
        extra: the extra it belongs to; None for the base install.
        python: bounds of the Python versions that need it, or empty.
    """

    name: str
    bounds: str
    extra: str | None = None
    python: str = ""

    @classmethod
    def parse(cls, line: str) -> Requirement:
        """A ``Requires-Dist`` line.

        Raises:
            ValueError: a form that this distribution's own metadata does not use.
        """
        match = _REQUIREMENT.fullmatch(line.strip())
        marker = None if match is None else _MARKER.fullmatch((match["marker"] or "").strip())
        if match is None or marker is None:
            raise ValueError(f"the requirement {line!r} cannot be understood")
        bounds = (match["bounds"] or "").replace(" ", "")
        python = f"{marker['operator']}{marker['python']}" if marker["python"] else ""
        for given in (bounds, python):
            fits("0", given)  # so that bounds that cannot be understood show here
        return cls(canonical_name(match["name"]), bounds, marker["extra"], python)

    def __str__(self) -> str:
        return self.name + self.bounds


def canonical_name(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def version_key(version: str) -> VersionKey:
    """Something that sorts as the version does; local parts (``+cu126``) do not count.

    Raises:
        ValueError: it does not begin with a number.
    """
    match = _VERSION.fullmatch(version.strip())
    if match is None:
        raise ValueError(f"{version!r} is no version")
    release = [int(part) for part in match["release"].split(".")]
    while len(release) > 1 and release[-1] == 0:  # 3.0 and 3.0.0 are the same
        release.pop()
    phase = _FINAL if match["phase"] is None else _PHASES[match["phase"].lower()]
    return tuple(release), phase, int(match["number"] or 0)


def fits(version: str, bounds: str) -> bool:
    """Whether a version lies within bounds.

    Args:
        version: of an installed package.
        bounds: comma-separated, all of which have to hold; empty means any version.

    Raises:
        ValueError: either cannot be understood.
    """
    key = version_key(version)
    for bound in filter(None, bounds.split(",")):
        match = _BOUND.fullmatch(bound.strip())
        if match is None:
            raise ValueError(f"the bound {bound!r} cannot be understood")
        limit = version_key(match[2])
        if match[1] == "<" and key[0] == limit[0] and key[1] < _FINAL <= limit[1]:
            return False  # "<81" means no release candidate of 81 either
        if not _OPERATORS[match[1]](key, limit):
            return False
    return True
