"""Entries of a config.json that Hugging Face and PaddleNLP spell differently, or that a family cannot honour."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from peft_deploy.errors import UnsupportedModelError

_REQUIRED = object()
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
# Hugging Face's names of the one tanh form of GELU; its "gelu" is the erf form.
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


class Entries(Mapping[str, Any]):
    """Several configurations as one: of every key the first value that is not null; null is as if not there.

    Unlike a merged ``dict`` it asks for nothing before it is asked, so that
    :mod:`~peft_deploy.families.unread` can tell what was looked at.

    Args:
        layers: the first one counts most.
    """

    def __init__(self, *layers: Mapping[str, Any]) -> None:
        self._layers = layers

    def __getitem__(self, key: str) -> Any:
        for layer in self._layers:
            if (value := layer.get(key)) is not None:
                return value
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        keys = dict.fromkeys(key for layer in self._layers for key in layer)
        return (key for key in keys if key in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def entry(config: Mapping[str, Any], *keys: str, default: Any = _REQUIRED) -> Any:
    """The value of the one of several keys that is there and not null.

    Args:
        config: the contents of config.json.
        keys: names of the same thing, PaddleNLP's first.
        default: when none is there.

    Raises:
        UnsupportedModelError: two are there and say different things.
        KeyError: none is there, and there is no default; names the first key.
    """
    found = {key: config[key] for key in keys if config.get(key) is not None}
    if not found:
        if default is _REQUIRED:
            raise KeyError(keys[0])
        return default
    first = next(iter(found.values()))
    if any(value != first for value in found.values()):
        texts = " and ".join(f"{key} to {value!r}" for key, value in found.items())
        raise UnsupportedModelError(f"config.json sets {texts}; they mean the same thing")
    return first


def refuse_set(config: Mapping[str, Any], features: Mapping[str, str]) -> None:
    """Refuses keys that are set to something true.

    Args:
        config: the contents of config.json.
        features: key → what it would mean.

    Raises:
        UnsupportedModelError: one of them is.
    """
    for key, feature in features.items():
        if config.get(key):
            raise UnsupportedModelError(f"config.json sets {key}: {feature} cannot be exported")


def refuse_other(config: Mapping[str, Any], values: Mapping[str, tuple[Any, str]]) -> None:
    """Refuses keys that are set to anything but one value.

    Args:
        config: the contents of config.json.
        values: key → the value that can be had, and why no other can.

    Raises:
        UnsupportedModelError: one of them differs.
    """
    for key, (value, reason) in values.items():
        if config.get(key) not in (None, value):
            raise UnsupportedModelError(
                f"config.json sets {key} to {config[key]!r}; {reason}, as {value!r} says"
            )


def activation(config: Mapping[str, Any], key: str, known: Mapping[str, str], default: str) -> str:
    """The activation function by PaddleNLP's name, which may say "gelu" for its tanh form.

    Args:
        config: the contents of config.json.
        key: PaddleNLP's; Hugging Face's is ``activation_function``.
        known: what the stand-in computes, by PaddleNLP's name → Hugging Face's.
        default: PaddleNLP's name of what is used when neither key is there.

    Raises:
        UnsupportedModelError: another function, or two different ones.
    """
    theirs = config.get("activation_function")
    own = {name: paddle for paddle, name in known.items()}
    own |= {name: own["gelu_new"] for name in TANH_GELU if "gelu_new" in own}
    if theirs is not None and theirs not in own:
        raise UnsupportedModelError(
            f"config.json sets activation_function to {theirs!r}; "
            f"PaddleNLP's class computes one of {', '.join(sorted(own))}",
        )
    translated = {key: config.get(key), "activation_function": own.get(str(theirs))}
    chosen: str = entry(translated, key, "activation_function", default=default)
    if chosen not in known:
        raise UnsupportedModelError(
            f"config.json sets {key} to {chosen!r}; exported are {', '.join(sorted(known))}"
        )
    return chosen


def token_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Ids of special tokens as PaddleNLP's configuration takes them: one end token, the first of several."""
    found = {key: config[key] for key in _TOKENS if config.get(key) is not None}
    return {key: v[0] if isinstance(v, list) else v for key, v in found.items()}


def head_dim(hidden_size: int, heads: int) -> int:
    """The size of a head, D = E / H.

    Raises:
        UnsupportedModelError: the heads do not divide the hidden size.
    """
    if hidden_size % heads:
        raise UnsupportedModelError(
            f"config.json divides a hidden size of {hidden_size} among {heads} attention heads; "
            "it has to be a multiple of them"
        )
    return hidden_size // heads
