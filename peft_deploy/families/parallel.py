"""How a family's layers are spread over tensor-parallel ranks, as data."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from peft_deploy.errors import AdapterError, UnsupportedModelError
from peft_deploy.families.family import Family

# Which axis of each parameter of a layer is spread, in PaddleNLP's layout; None: every rank has all of it.
_COLUMN: dict[str, int | None] = {"weight": 1, "bias": 0, "lora_A": None, "lora_B": 1}
_ROW: dict[str, int | None] = {"weight": 0, "bias": None, "lora_A": 0, "lora_B": None}


@dataclass(frozen=True)
class ParallelRule:
    """What becomes of one kind of layer.

    Args:
        module: its name; ``{i}`` stands for a layer's index.
        by: ``"column"`` (the output features are spread) or ``"row"`` (the input features are; also the rows of
            an embedding).
        units: the field of :class:`~peft_deploy.families.ModelDims` whose things are dealt out whole, such as
            ``"num_heads"``; None when single features are.
        or_whole: every rank holds the whole layer when the units do not divide evenly.
    """

    module: str
    by: str
    units: str | None = None
    or_whole: bool = False


def parallel_axes(
    family: Family, config: Mapping[str, Any], degree: int
) -> Callable[[str], int | None]:
    """Tells for each parameter of a model, or of an adapter for it, which axis is spread over the ranks.

    Args:
        family: the model's.
        config: its config.json.
        degree: number of ranks.

    Returns:
        A function from a parameter's name to an axis, None for one that every rank holds; it raises
        :class:`AdapterError` for LoRA on a module of which nothing is known.

    Raises:
        UnsupportedModelError: nothing is known of the family's layers.
        AdapterError: the heads do not divide by the number of ranks.
    """
    if not family.parallel_rules:
        raise UnsupportedModelError(
            f"how a {family.paddle_model(config)} is spread over tensor-parallel ranks is not known"
        )
    kinds = []
    for rule in family.parallel_rules:
        pattern = re.escape(rule.module).replace(re.escape("{i}"), r"\d+")
        kinds.append((re.compile(pattern), _kind(rule, family, config, degree)))

    def axis(name: str) -> int | None:
        module, _, parameter = name.rpartition(".")
        for pattern, kind in kinds:
            if pattern.fullmatch(module):
                return kind.get(parameter) if kind else None
        if parameter in ("lora_A", "lora_B"):
            raise AdapterError(
                f"{name}: a {family.paddle_model(config)} has no layer {module} that would be spread over ranks"
            )
        return None

    return axis


def _kind(
    rule: ParallelRule, family: Family, config: Mapping[str, Any], degree: int
) -> dict[str, int | None]:
    """Parameter → axis; empty when every rank holds the whole layer."""
    kind = _COLUMN if rule.by == "column" else _ROW
    if rule.units is None:
        return kind
    count = getattr(family.dims(config), rule.units)
    if count % degree == 0:
        return kind
    if rule.or_whole:
        return {}
    raise AdapterError(
        f"{rule.module} cannot be spread over {degree} ranks: {rule.units} is {count}",
        hint=f"the number of ranks has to divide {count}",
    )
