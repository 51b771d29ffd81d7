"""How bundles are measured."""

from __future__ import annotations

from dataclasses import dataclass, fields

from peft_deploy.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Options of a speed measurement.

    Args:
        batches: batch sizes.
        prompt_tokens: lengths of the prompts.
        new_tokens: decoding steps after each prompt.
        rounds: how often every lane is measured; one more goes before them that does not count.
        adapters: names of the adapters to measure; all that the bundles have when empty.
        provider: ``"cpu"`` or ``"cuda"``.
        threads: threads within one operator; None for all cores.

    Raises:
        ConfigError: a number below 1.
    """

    batches: tuple[int, ...] = (1,)
    prompt_tokens: tuple[int, ...] = (128,)
    new_tokens: int = 16
    rounds: int = 5
    adapters: tuple[str, ...] = ()
    provider: str = "cpu"
    threads: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            numbers = value if isinstance(value, tuple) else (value,)
            if any(isinstance(n, int) and n < 1 for n in numbers):
                raise ConfigError(f"{field.name} is {value}; it must be at least 1")

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """What is measured: rows and tokens of a row's prompt, each with each."""
        return [(batch, length) for batch in self.batches for length in self.prompt_tokens]
