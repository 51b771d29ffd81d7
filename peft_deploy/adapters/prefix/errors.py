"""Errors of prefix-tuning that are also the built-in exceptions which paddlenlp.peft raises in
their place.
"""

from __future__ import annotations

from peft_deploy.errors import ExecutionError, UnsupportedModelError


class PrefixInputError(ExecutionError, ValueError):
    """A prefix model got inputs that it cannot take, or would take for something else."""


class UnsupportedPrefixModelError(UnsupportedModelError, NotImplementedError):
    """Prefix-tuning is not possible with this model."""
