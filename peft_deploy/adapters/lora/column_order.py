"""Column-parallel layers of which a rank does not hold a slice of the whole weight.

Where several matrices lie side by side in one weight (query, key and value, or gate and up), some
models give each rank a slice of each. Setting the ranks' columns side by side then gives another
weight than the one on a single card, and the same holds for lora_B. PaddleNLP knows the right order
for its weights; what it does with columns that are numbered shows which layers are affected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from paddle import nn

MergeRule = Callable[[list[Any]], Any]
COLUMNS = 1  # the axis of a weight [in, out] that column-parallel layers spread


def reordered_columns(model: nn.Layer, degree: int) -> frozenset[str]:
    """The names of the column-parallel layers whose ranks hold columns from several places.

    Args:
        model: PaddleNLP's, with or without LoRA layers in it; of others nothing is known, and
            fleet's own order is taken to be the model's.
        degree: number of ranks.
    """
    rules = _merge_rules(model)
    found = set()
    for name, layer in model.named_sublayers():
        weight, rule = layer._parameters.get("weight"), _rule_for(f"{name}.weight", rules)
        if rule is None or getattr(weight, "split_axis", None) != COLUMNS:
            continue
        if not _keeps_order(rule, int(weight.shape[COLUMNS]), degree):
            found.add(name)
    return frozenset(found)


def _merge_rules(model: nn.Layer) -> Mapping[str, MergeRule]:
    """How PaddleNLP puts the ranks' weights together, by parameter."""
    mappings = getattr(model, "_get_tensor_parallel_mappings", None)
    if mappings is None:
        return {}
    try:
        rules: Mapping[str, MergeRule] = mappings(model.config, is_split=False)
    except NotImplementedError:  # a model that PaddleNLP cannot spread
        return {}
    return rules


def _rule_for(name: str, rules: Mapping[str, MergeRule]) -> MergeRule | None:
    # some models' rules have names without the prefix of the model under the head
    fits = (key for key in rules if name == key or name.endswith(f".{key}"))
    found = max(fits, key=len, default=None)
    return None if found is None else rules[found]


def _keeps_order(rule: MergeRule, columns: int, degree: int) -> bool:
    """Whether the rule sets the ranks' columns side by side as they come."""
    numbered = np.arange(columns * degree, dtype=np.float32).reshape(1, -1)
    merged = rule(np.split(numbered, degree, axis=1))
    return np.array_equal(np.asarray(merged), numbered)
