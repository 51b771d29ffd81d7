"""Rotary positions as config.json spells them: in either generation of transformers, or in PaddleNLP's words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_deploy.errors import CheckpointError, UnsupportedModelError
from peft_deploy.families.entries import Entries

_ROPE_PARAMETERS = "rope_parameters"  # where transformers 5 keeps theta and scaling together
_NOT_SCALING = ("rope_theta", "partial_rotary_factor")
_LENGTH_DEPENDENT = ("dynamic", "dynamic_ntk", "longrope")
_LLAMA3_KEYS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


def plain_rope(config: Mapping[str, Any], reference: str) -> Mapping[str, Any]:
    """The configuration with ``rope_parameters`` of transformers 5 spelled as its earlier releases did.

    Args:
        config: contents of config.json.
        reference: what computes the model, for messages.

    Raises:
        CheckpointError: the entry is no object.
        UnsupportedModelError: only a part of each head is rotated.
    """
    rope = config.get(_ROPE_PARAMETERS) or {}
    for key, entry in ((_ROPE_PARAMETERS, rope), ("rope_scaling", config.get("rope_scaling"))):
        if entry and not isinstance(entry, Mapping):
            raise CheckpointError(f"config.json sets {key} to {entry!r}; it must be an object")
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise UnsupportedModelError(
            f"config.json sets partial_rotary_factor to {partial}; {reference} rotates whole heads"
        )
    if not rope:
        return config
    scaling = {key: value for key, value in rope.items() if key not in _NOT_SCALING}
    own = {"rope_theta": rope.get("rope_theta"), "rope_scaling": scaling or None}
    return Entries(own, config)


def scaling_kind(config: Mapping[str, Any]) -> str | None:
    """The kind of rope scaling that a configuration asks for; None for plain rotary positions."""
    scaling = config.get("rope_scaling") or {"type": config.get("rope_scaling_type")}
    kind = scaling.get("rope_type", scaling.get("type"))
    return None if kind in (None, "default") else str(kind)


def refuse_scaling(config: Mapping[str, Any], reference: str) -> None:
    """Passes when the configuration asks for plain rotary positions.

    Raises:
        UnsupportedModelError: it asks for a scaling, and the reference computes none.
    """
    kind = scaling_kind(config)
    if kind is not None:
        raise UnsupportedModelError(
            f"config.json asks for rope scaling {kind!r}; {reference} ignores it and rotates as without",
            hint="an adapter that was trained with PaddleNLP was trained without the scaling: "
            "remove the entry from config.json to export what was trained",
        )


def scaled_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rope scaling in the words of PaddleNLP's Llama, which knows Hugging Face's ``rope_scaling`` only for Llama 3.

    Raises:
        UnsupportedModelError: for a kind that PaddleNLP would silently ignore, that lacks one of its numbers,
            or that depends on the sequence length and so is no fixed table.
    """
    kind, scaling = scaling_kind(config), config.get("rope_scaling") or {}
    if kind is None:
        return {}
    if kind == "llama3":
        _require_numbers(scaling, _LLAMA3_KEYS)
        return {"rope_scaling": {**scaling, "rope_type": "llama3"}}
    if kind in _LENGTH_DEPENDENT:
        raise UnsupportedModelError(
            f"config.json asks for rope scaling {kind!r}: its rotation of every token changes with the length of "
            "the text, so a cache would hold keys that were rotated for another length",
            hint="exported are: none, linear, ntk (PaddleNLP's), llama3",
        )
    if kind not in ("linear", "ntk"):
        raise UnsupportedModelError(
            f"config.json asks for rope scaling {kind!r}, which PaddleNLP's Llama does not compute",
            hint="exported are: none, linear, ntk (PaddleNLP's), llama3",
        )
    numbers = scaling if scaling else {"factor": config.get("rope_scaling_factor", 1.0)}
    _require_numbers(numbers, ("factor",))
    return {"rope_scaling_type": kind, "rope_scaling_factor": float(numbers["factor"])}


def stretched(max_positions: int, arguments: Mapping[str, Any]) -> int:
    """The size of the table of rotations that PaddleNLP's Llama makes with these arguments."""
    return int(max_positions * arguments.get("rope_scaling_factor", 1.0))


def huggingface_rope(
    config: Mapping[str, Any], arguments: Mapping[str, Any], head_dim: int
) -> dict[str, Any]:
    """The entries of a Hugging Face config.json that make the same rotations.

    Args:
        config: contents of config.json, with ``rope_theta`` and ``max_position_embeddings``.
        arguments: from :func:`scaled_arguments`.
        head_dim: D.
    """
    theta, positions = config["rope_theta"], config["max_position_embeddings"]
    scaling = arguments.get("rope_scaling")
    factor = arguments.get("rope_scaling_factor", 1.0)
    if arguments.get("rope_scaling_type") == "linear":
        scaling = {"rope_type": "linear", "factor": factor}
    elif arguments.get("rope_scaling_type") == "ntk":
        # transformers has no such kind; it is another base, and a longer table.
        theta *= factor ** (head_dim / (head_dim - 2))
        positions = stretched(positions, arguments)
    return {
        "rope_theta": theta,
        "max_position_embeddings": positions,
        "rope_scaling": scaling,
    }


def _require_numbers(scaling: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    for key in keys:
        value = scaling.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise UnsupportedModelError(
                f"config.json asks for rope scaling with {key} {value!r}; it must be a positive number"
            )
