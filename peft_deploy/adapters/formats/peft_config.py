"""Hugging Face PEFT's ``adapter_config.json``: what it says, and what in it cannot be represented."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_deploy.errors import AdapterError, listed

PEFT_CONFIG_NAME = "adapter_config.json"
LORA, PREFIX = "LORA", "PREFIX_TUNING"

# Options that change what is computed, or what the tensors mean.
_REFUSED = {
    "use_dora": "DoRA",
    "lora_bias": "a bias beside lora_B",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "trainable_token_indices": "trainable tokens",
    "target_parameters": "LoRA on parameters that are no layer's weight, as in mixtures of experts",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "megatron_config": "Megatron's layers",
    "loftq_config": "LoftQ",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
}
# Ways to start A and B that leave the base model's weights as they are; all others change them.
_HARMLESS_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
_KNOWN = frozenset(
    [
        "peft_type",
        "task_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "peft_version",
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "fan_in_fan_out",
        "bias",
        "modules_to_save",
        "init_lora_weights",
        "megatron_core",
        "runtime_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "qalora_group_size",
    ]
)


@dataclass(frozen=True)
class PeftLoraConfig:
    """The options of a PEFT LoRA adapter; names of modules are Hugging Face's.

    Args:
        r: rank of the modules that rank_pattern does not name.
        lora_alpha: numerator of the scaling of those that alpha_pattern does not name.
        use_rslora: scaling alpha / sqrt(R) in place of alpha / R.
        rank_pattern: name or regular expression → rank; the first that fits counts.
        alpha_pattern: likewise → alpha.
        target_modules: a regular expression for whole names, ``"all-linear"``, or names and ends of names.
        exclude_modules: likewise, without ``"all-linear"``.
        layers_to_transform: layers that are adapted; None for all.
        layers_pattern: names of the list of layers; empty for any.
        fan_in_fan_out: whether the adapted layers keep their weights as [in, out].
        modules_to_save: ends of the names of modules that are saved whole.
        lora_dropout: while training.
        base_name: what it says of the base model.
    """

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    fan_in_fan_out: bool
    modules_to_save: tuple[str, ...]
    lora_dropout: float
    base_name: str | None

    def rank_of(self, module: str) -> int:
        """R of a module."""
        return int(_by_pattern(self.rank_pattern, module, self.r))

    def scaling_of(self, module: str) -> float:
        """What a module's B · A is multiplied by."""
        alpha, rank = (
            _by_pattern(self.alpha_pattern, module, self.lora_alpha),
            self.rank_of(module),
        )
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def is_target(self, module: str) -> bool:
        """Whether PEFT would adapt a linear layer of this name; it ignores tensors of any other."""
        if self.exclude_modules and _matches(self.exclude_modules, module):
            return False
        if (
            self.target_modules == "all-linear"
        ):  # all but the output layer, the one outside of the layers
            return any(part.isdigit() for part in module.split("."))
        if not _matches(self.target_modules, module):
            return False
        if self.layers_to_transform is None or isinstance(self.target_modules, str):
            return True
        if module in self.target_modules:
            return True
        lists = self.layers_pattern or (r"[^.]*",)
        found = (re.match(rf".*\.{name}\.(\d+)\.", module) for name in lists)
        index = next((int(match[1]) for match in found if match), None)
        return index in self.layers_to_transform


def read_peft_json(folder: Path) -> dict[str, Any]:
    """The contents of ``adapter_config.json``, with ``peft_type`` in capitals.

    Raises:
        AdapterError: missing, not a JSON object, or without a ``peft_type``.
    """
    path = folder / PEFT_CONFIG_NAME
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as exc:
        raise AdapterError(f"{path} cannot be read: {exc}") from exc
    if not isinstance(data, dict) or not isinstance(data.get("peft_type"), str):
        raise AdapterError(f"{path} does not say its peft_type; LORA or PREFIX_TUNING can be read")
    return {**data, "peft_type": data["peft_type"].upper()}


def parse_lora_config(data: Mapping[str, Any], where: Path) -> PeftLoraConfig:
    """The options of a LoRA adapter.

    Args:
        data: from :func:`read_peft_json`.
        where: the folder, for messages.

    Raises:
        AdapterError: another method, an option that cannot be represented, or a value of a wrong form.
    """
    if data["peft_type"] != LORA:
        raise AdapterError(
            f"{where} is a PEFT adapter of the type {data['peft_type']}; {LORA} is needed here",
            hint="PEFT can merge it into the base model: merge_and_unload()",
        )
    _refuse(data, where)
    targets = _names(data, "target_modules", where)
    if not targets:
        raise AdapterError(f"{where / PEFT_CONFIG_NAME} does not say target_modules")
    layers = data.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    pattern = data.get("layers_pattern") or ()
    try:
        return PeftLoraConfig(
            r=_rank(data.get("r", 8)),
            lora_alpha=_number(data.get("lora_alpha", 8)),
            use_rslora=bool(data.get("use_rslora", False)),
            rank_pattern={k: _rank(v) for k, v in _patterns(data, "rank_pattern").items()},
            alpha_pattern={k: _number(v) for k, v in _patterns(data, "alpha_pattern").items()},
            target_modules=targets,
            exclude_modules=_names(data, "exclude_modules", where),
            layers_to_transform=tuple(int(i) for i in layers) if layers else None,
            layers_pattern=(pattern,) if isinstance(pattern, str) else tuple(pattern),
            fan_in_fan_out=bool(data.get("fan_in_fan_out", False)),
            modules_to_save=tuple(data.get("modules_to_save") or ()),
            lora_dropout=_number(data.get("lora_dropout", 0.0)),
            base_name=data.get("base_model_name_or_path"),
        )
    except (TypeError, ValueError, AttributeError, re.error) as exc:
        raise AdapterError(
            f"{where / PEFT_CONFIG_NAME} holds a value that cannot be used: {exc}"
        ) from exc


def _refuse(data: Mapping[str, Any], where: Path) -> None:
    found = [f"{feature} ({key})" for key, feature in _REFUSED.items() if data.get(key)]
    start = data.get("init_lora_weights", True)
    if start not in _HARMLESS_STARTS:
        found.append(
            f"a start that changes the base model's weights (init_lora_weights {start!r})"
        )
    if data.get("bias", "none") != "none":
        found.append(f"trained biases (bias {data['bias']!r})")
    unknown = data.keys() - _KNOWN - _REFUSED.keys() - {"bias"}
    found += [f"an option that is not known here ({key})" for key in sorted(unknown) if data[key]]
    if found:
        raise AdapterError(
            f"{where} uses what cannot be represented:\n{listed(found)}",
            hint="PEFT can merge it into the base model: merge_and_unload()",
        )


def _names(data: Mapping[str, Any], option: str, where: Path) -> str | tuple[str, ...]:
    value = data.get(option) or ()
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as exc:
            raise AdapterError(
                f"{where}: {option} {value!r} is no regular expression: {exc}"
            ) from exc
        return value
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise AdapterError(f"{where}: {option} is {value!r}; a string or a list of them is needed")
    return tuple(value)


def _patterns(data: Mapping[str, Any], option: str) -> dict[str, Any]:
    patterns = dict(data.get(option) or {})
    for key in patterns:
        re.compile(key)
    return patterns


def _matches(spec: str | tuple[str, ...], module: str) -> bool:
    if isinstance(spec, str):
        return re.fullmatch(spec, module) is not None
    return any(f".{module}".endswith(f".{name}") for name in spec)


def _by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _rank(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{value!r} is no rank")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no finite number")
    return value
