"""How one vector of a text is made from the hidden states of its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from peft_deploy.errors import ConfigError

# An entry of config.json, ours: transformers and PaddleNLP carry it along unread.
POOLING = "sentence_pooling"
MODES = ("mean", "cls")


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """The pooling of a sentence encoder (Reimers and Gurevych 2019).

    Args:
        mode: ``mean`` of the real tokens, or ``cls``, the first of them.
        normalize: whether the vector is divided by its Euclidean length.

    Raises:
        ConfigError: an unknown mode.
    """

    mode: str
    normalize: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"pooling {self.mode!r} is unknown; it can be {' or '.join(MODES)}")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return asdict(self)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Pooling | None:
        """What a configuration says; None when it says nothing.

        Raises:
            ConfigError: it says something else than a pooling.
        """
        entry = config.get(POOLING)
        if entry is None:
            return None
        if not isinstance(entry, Mapping) or not entry.keys() <= {"mode", "normalize"}:
            raise ConfigError(
                f"config.json sets {POOLING} to {entry!r}; "
                'it should be like {"mode": "mean", "normalize": true}'
            )
        return cls(mode=str(entry.get("mode")), normalize=bool(entry.get("normalize", False)))

    def into(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration with this pooling in it."""
        return {**config, POOLING: self.to_dict()}
