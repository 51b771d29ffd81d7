"""Which modules a pattern of ``target_modules`` or ``trainable_modules`` means.

A pattern is read as the reference reads it, a regular expression that has to match the whole
dotted name. Where it matches nothing that way, a plain name is taken for the last component(s) of
a dotted name, which is what the specification's "list of module names" promises: ``q_proj`` and
``self_attn.q_proj`` both find ``llama.layers.0.self_attn.q_proj``.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Sequence

from peft_deploy.config.errors import LoRAConfigError
from peft_deploy.errors import nearest

_PLAIN_NAME = re.compile(r"\w+(?:\.\w+)*")


def is_plain_name(pattern: str) -> bool:
    """Whether the pattern is a dotted name, without special characters of regular expressions."""
    return _PLAIN_NAME.fullmatch(pattern) is not None


def match_pattern(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that one pattern means, in the order given; empty when it means none of them.

    Raises:
        LoRAConfigError: the pattern is not a valid regular expression.
    """
    try:
        regex = re.compile(pattern)
    except re.error as exc:
        raise LoRAConfigError(
            f"{pattern!r} is neither a module name nor a valid regular expression: {exc}"
        ) from exc
    candidates = list(names)
    found = [name for name in candidates if regex.fullmatch(name)]
    if not found and is_plain_name(pattern):
        found = [name for name in candidates if f".{name}".endswith(f".{pattern}")]
    return found


def match_patterns(
    patterns: Sequence[str], names: Collection[str], option: str, *, quiet: bool = False
) -> dict[str, list[str]]:
    """What each pattern means, as ``{pattern: names}``.

    The lists of patterns that PaddleNLP keeps for each architecture name layers that only some
    variants have, so a regular expression that matches nothing beside others that match is
    reported by a warning. Everything else that matches nothing is an error.

    Args:
        patterns: plain names or regular expressions.
        names: dotted names to choose from.
        option: the option that the patterns come from, for messages.
        quiet: no warning, because something stricter is checked afterwards.

    Raises:
        LoRAConfigError: no pattern matches, or a plain name does not.
    """
    matches = {pattern: match_pattern(pattern, names) for pattern in patterns}
    idle = [pattern for pattern, found in matches.items() if not found]
    fatal = idle if len(idle) == len(matches) else [p for p in idle if is_plain_name(p)]
    if fatal:
        raise LoRAConfigError(
            f"{option}: {_quoted(fatal)} matches none of the model's {len(names)} names",
            hint=_suggestion(fatal, names),
        )
    if idle and not quiet:
        warnings.warn(f"{option}: {_quoted(idle)} matches none of the model's names", stacklevel=3)
    return matches


def _quoted(patterns: Sequence[str]) -> str:
    return ", ".join(repr(pattern) for pattern in patterns) or "an empty list"


def _suggestion(patterns: Sequence[str], names: Collection[str]) -> str:
    """Names of the model that look like what the patterns were meant to find."""
    last = sorted({name.rpartition(".")[2] for name in names} - {""})
    words = [word for pattern in patterns for word in re.findall(r"[A-Za-z_]\w*", pattern)]
    close = list(dict.fromkeys(found for word in words for found in nearest(word, last)))
    if close:
        return f"the nearest names are {', '.join(close[:5])}"
    readable = [name for name in last if not name.isdigit()]
    return f"names in this model: {', '.join(readable[:12])}" if readable else "it has no names"
