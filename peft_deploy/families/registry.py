"""Which family a model belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from peft_deploy.errors import UnsupportedModelError, nearest
from peft_deploy.families.broken import find_broken
from peft_deploy.families.family import Family

F = TypeVar("F", bound=Family)
_BY_ARCHITECTURE: dict[str, Family] = {}


def register(cls: type[F]) -> type[F]:
    """Class decorator: makes the family known under each of its architecture names."""
    family = cls()
    for name in cls.architectures:
        if name in _BY_ARCHITECTURE:
            raise ValueError(f"two families claim the architecture {name}")
        _BY_ARCHITECTURE[name] = family
    return cls


def known_architectures() -> list[str]:
    """The architecture names that some family claims, sorted."""
    return sorted(_BY_ARCHITECTURE)


def find_family(config: Mapping[str, Any]) -> Family:
    """The family that claims a config.json.

    Raises:
        UnsupportedModelError: none does; the message names the known architectures, or says why the model does not
            even run in PaddleNLP.
    """
    named = config.get("architectures") or []
    for name in named:
        if name in _BY_ARCHITECTURE:
            return _BY_ARCHITECTURE[name].configured(config)
    if not named:
        for family in _BY_ARCHITECTURE.values():
            if family.model_type == config.get("model_type"):
                return family.configured(config)
    if broken := find_broken(named, config.get("model_type")):
        name, fault = broken
        raise UnsupportedModelError(
            f"{name} cannot be exported: PaddleNLP's own class fails on Paddle 3.3: {fault.reason}"
        )
    asked = ", ".join(named) or f"model_type {config.get('model_type')!r}"
    close = nearest(named[0] if named else "", _BY_ARCHITECTURE)
    raise UnsupportedModelError(
        f"no model family is registered for {asked}; "
        f"the known architectures are {', '.join(known_architectures())}",
        hint=(f"the closest is {close[0]}; " if close else "")
        + "export --signature FILE takes any model, by its own forward",
    )
