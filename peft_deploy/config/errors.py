"""Configuration errors that are also the built-in exceptions which paddlenlp.peft raises in their
place.

Code that was written against the reference and catches ``ValueError`` or ``TypeError`` keeps
working.
"""

from __future__ import annotations

from peft_deploy.errors import ConfigError


class LoRAConfigError(ConfigError, ValueError):
    """A LoRA option has a value that cannot be used."""


class LoRAConfigTypeError(ConfigError, TypeError):
    """A LoRA option has a value of the wrong type."""


class PrefixConfigError(ConfigError, ValueError):
    """A prefix-tuning option has a value that cannot be used."""
