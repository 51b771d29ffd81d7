"""Between a prefix model in memory and its folder on disk."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import paddle

from peft_deploy.adapters.arrays import assign, to_array
from peft_deploy.adapters.formats.prefix import PrefixAdapter, write_prefix
from peft_deploy.adapters.provenance import ROUNDING, Provenance, WeightSample, sample_modules
from peft_deploy.errors import AdapterError, listed

if TYPE_CHECKING:
    from peft_deploy.adapters.prefix.model import PrefixModelForCausalLM


def save_prefix(model: PrefixModelForCausalLM, folder: Path, variant: str | None) -> None:
    """Writes the files of :meth:`PrefixModelForCausalLM.save_pretrained`.

    Raises:
        OutputError: the folder cannot be written.
        AdapterError: NaN or infinity in the prefix.
    """
    tensors = {name: to_array(t) for name, t in model.get_trainable_state_dict().items()}
    matrices = _matrices(model)
    samples = {
        name: WeightSample.of(to_array(matrices[name])) for name in sample_modules(list(matrices))
    }
    provenance = Provenance(base_fingerprint=model.base_fingerprint, base_weights=samples)
    prefix = PrefixAdapter(folder, replace(model.prefix_config), tensors, provenance)
    write_prefix(prefix, variant)


def load_into(model: PrefixModelForCausalLM, prefix: PrefixAdapter) -> None:
    """Gives a prefix's values to the encoder.

    Raises:
        AdapterError: keys are missing, unexpected or of another shape. Nothing has been changed
            then.
    """
    parameters = dict(model.prefix_encoder.state_dict())
    wrong = [
        f"{name}: {list(array.shape)} in the file, {list(parameters[name].shape)} for this model"
        for name, array in prefix.state.items()
        if list(array.shape) != list(parameters[name].shape)
    ]
    if wrong:
        raise AdapterError(
            f"the prefix {prefix.path} does not fit the model:\n{listed(wrong)}",
            hint="was it trained on another model?",
        )
    if prefix.provenance is not None:
        _compare_base(model, prefix.provenance)
        model.base_fingerprint = prefix.provenance.base_fingerprint
    for name, array in prefix.state.items():
        assign(parameters[name], array)


def _compare_base(model: PrefixModelForCausalLM, provenance: Provenance) -> None:
    """Warns when the base model is not the one that the prefix was trained on."""
    matrices = _matrices(model)
    other = []
    for name, sample in provenance.base_weights.items():
        now = WeightSample.of(to_array(matrices[name])) if name in matrices else None
        if now is None or not _same(sample, now):
            other.append(name)
    if other:
        warnings.warn(
            "the base model is not the one that the prefix was trained on; "
            "these weights differ:\n" + listed(other),
            stacklevel=4,
        )


def _matrices(model: PrefixModelForCausalLM) -> dict[str, paddle.Tensor]:
    """The base model's weights that are worth a sample: no norms and biases, which start equal."""
    return {name: p for name, p in model.model.named_parameters() if p.ndim > 1}


def _same(then: WeightSample, now: WeightSample) -> bool:
    if len(then.values) != len(now.values):
        return False
    a, b = np.array(then.values), np.array(now.values)
    unit = ROUNDING.get(then.dtype, 0.0) + ROUNDING.get(now.dtype, 0.0)
    return bool(np.all(np.abs(a - b) <= unit * np.abs(a) + 1e-12))
