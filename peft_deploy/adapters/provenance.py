"""Where an adapter comes from: a small file beside it, so that it cannot be applied twice
unnoticed.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from peft_deploy.config.json_file import write_json
from peft_deploy.errors import AdapterError, listed
from peft_deploy.weights.lora import LoraPair, lora_delta
from peft_deploy.weights.source import Array

PROVENANCE_NAME = "peft_deploy_adapter.json"
FORMAT_VERSION = 1
SAMPLED_MODULES = 8
SAMPLED_ELEMENTS = 16

# Largest relative error of one rounding to each type, doubled: what may lie between two copies of
# one weight.
ROUNDING = {"float64": 2.0**-22, "float32": 2.0**-22, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@dataclass(frozen=True)
class WeightSample:
    """A few elements of one weight, evenly spaced over its flattened form.

    Args:
        dtype: the type that the weight had.
        values: the elements as floats.
    """

    dtype: str
    values: tuple[float, ...]

    @classmethod
    def of(cls, weight: Array) -> WeightSample:
        """The sample of a weight."""
        return cls(
            weight.dtype.name, tuple(float(x) for x in weight.reshape(-1)[_positions(weight)])
        )


@dataclass(frozen=True)
class Provenance:
    """The contents of ``peft_deploy_adapter.json``.

    Args:
        base_fingerprint: of the base model's weights, when it is known.
        base_weights: a sample of some of the adapted weights as they were before LoRA, by module.
        merged: whether the model in memory was merged with the adapter when this was written.
        principal_start: PiSSA: A and B started from the base's weights, so the base has to give up
            its principal part before they are added.
        format_version: version of this file's form.
    """

    base_fingerprint: str | None = None
    base_weights: Mapping[str, WeightSample] = field(default_factory=dict)
    merged: bool = False
    principal_start: bool = False
    format_version: int = FORMAT_VERSION

    def save(self, folder: Path) -> None:
        """Writes the file into the adapter's folder."""
        write_json(folder / PROVENANCE_NAME, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Provenance | None:
        """What the folder says; None when it has no such file, as the reference's adapters.

        Raises:
            AdapterError: the file is damaged or of a newer version.
        """
        path = folder / PROVENANCE_NAME
        if not path.is_file():
            return None
        try:
            data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if data["format_version"] > FORMAT_VERSION:
                raise AdapterError(
                    f"{path} has format_version {data['format_version']}; "
                    f"this release reads up to {FORMAT_VERSION}",
                    hint="update peft-deploy",
                )
            data["base_weights"] = {
                module: WeightSample(sample["dtype"], tuple(sample["values"]))
                for module, sample in data["base_weights"].items()
            }
            return cls(**data)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
            raise AdapterError(f"{path} cannot be read: {exc}") from exc

    def check_base(
        self, pairs: Mapping[str, LoraPair], read: Callable[[str], Array | None]
    ) -> None:
        """Refuses base weights that hold this adapter already, and warns about others than it was
        trained on.

        Args:
            pairs: the adapter's matrices by module.
            read: gives a module's weight as a matrix, before LoRA; None where it is not to be had.

        Raises:
            AdapterError: some sampled weight is the recorded one plus the adapter.
        """
        merged: list[str] = []
        other: list[str] = []
        for module, sample in self.base_weights.items():
            weight = read(module)
            if weight is None or module not in pairs or sample.dtype not in ROUNDING:
                continue
            then = np.array(sample.values)
            now = np.array(WeightSample.of(weight).values)
            if then.shape != now.shape:
                other.append(module)
                continue
            unit = ROUNDING[sample.dtype] + ROUNDING.get(weight.dtype.name, 0.0)
            if _close(now, then, unit * np.abs(then)):
                continue
            added = np.array(WeightSample.of(lora_delta(pairs[module])).values)
            slack = 4 * unit * (np.abs(then) + np.abs(added))
            (merged if _close(now, then + added, slack) else other).append(module)
        if merged:
            raise AdapterError(
                f"the base model already holds this adapter, merged into:\n{listed(merged)}",
                hint="give the base model that the adapter was trained on",
            )
        if other:
            warnings.warn(
                "the base model is not the one that the adapter was trained on; "
                "these weights differ:\n" + listed(other),
                stacklevel=3,
            )


def describe(provenance: Provenance | None) -> dict[str, Any] | None:
    """What is worth telling a reader of it."""
    if provenance is None:
        return None
    return {
        "base_fingerprint": provenance.base_fingerprint,
        "sampled_modules": len(provenance.base_weights),
        "saved_while_merged": provenance.merged,
        "principal_start": provenance.principal_start,
    }


def without_samples(provenance: Provenance | None) -> Provenance | None:
    """Without the samples of weights: those of a tensor-parallel rank are of its part of each."""
    return None if provenance is None else replace(provenance, base_weights={})


def sample_modules(modules: list[str]) -> list[str]:
    """Up to :data:`SAMPLED_MODULES` of the names, evenly spaced."""
    if not modules:
        return []
    spaced = np.linspace(0, len(modules) - 1, min(SAMPLED_MODULES, len(modules))).round()
    return [modules[int(i)] for i in spaced]


def _positions(weight: Array) -> Any:
    # A prime step keeps the sample from staying in one column of the matrix.
    count = min(SAMPLED_ELEMENTS, weight.size)
    spaced = np.linspace(0, max(0, weight.size - 1), count).round().astype(np.int64)
    return (spaced + 7 * np.arange(count)) % max(1, weight.size)


def _close(a: Any, b: Any, slack: Any) -> bool:
    return bool(np.all(np.abs(a - b) <= slack + 1e-12))
