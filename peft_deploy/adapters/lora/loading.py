"""Puts the tensors of an adapter into the LoRA layers of a model, or says exactly why they do not
fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import paddle

from peft_deploy.adapters.arrays import assign
from peft_deploy.adapters.formats import Adapter
from peft_deploy.adapters.lora.attachment import Attachment
from peft_deploy.adapters.lora.ranks import for_this_rank
from peft_deploy.adapters.lora.trainable import is_branch, named_parameters
from peft_deploy.errors import AdapterError, listed
from peft_deploy.weights.source import Array


def branch_parameters(attachment: Attachment) -> dict[str, paddle.Tensor]:
    """A and B of every adapted module, under the names of the file."""
    return {
        f"{name}.{half}": getattr(adapted.layer, half)
        for name, adapted in attachment.adapted.items()
        for half in ("lora_A", "lora_B")
    }


def load_into(attachment: Attachment, adapter: Adapter, *, check_base: bool = True) -> None:
    """Gives an adapter's values to a fresh or unmerged attachment of the same configuration.

    Args:
        attachment: where to; unmerged.
        adapter: what was read; of a whole one, a model that is spread over ranks takes its part.
        check_base: whether to compare the base model's weights with those that the adapter was
            trained on.

    Raises:
        AdapterError: keys are missing, unexpected or of another shape; all of them are listed.
            Nothing has been changed then.
    """
    adapter = for_this_rank(attachment, adapter)
    branches = branch_parameters(attachment)
    base = {n: p for n, p in named_parameters(attachment.model).items() if not is_branch(n)}
    _check_keys(adapter, branches, attachment.extras, base)
    if check_base and adapter.provenance is not None:
        adapter.provenance.check_base(adapter.pairs, lambda name: base_matrix(attachment, name))
    attachment.add_extras({name: base[name] for name in adapter.replacements})
    for name, parameter in branches.items():
        assign(parameter, adapter.state[name])
    attachment.set_extra_values(dict(adapter.replacements))


def base_matrix(attachment: Attachment, module: str) -> Array | None:
    """The weight of an adapted module before LoRA as a matrix; None where it was trained or is
    unknown.
    """
    adapted = attachment.adapted.get(module)
    if adapted is None or f"{module}.weight" in attachment.extras:
        return None
    return adapted.layer.as_matrix(adapted.layer.original_weight())


def _check_keys(
    adapter: Adapter,
    branches: Mapping[str, paddle.Tensor],
    extras: Mapping[str, paddle.Tensor],
    base: Mapping[str, paddle.Tensor],
) -> None:
    state = adapter.state
    missing = [name for name in (*branches, *extras) if name not in state]
    known = {**base, **branches}
    unexpected = [name for name in state if name not in known]
    misshaped = [
        f"{name}: {list(state[name].shape)} in the file, {list(known[name].shape)} in the model"
        for name in state
        if name in known and list(state[name].shape) != list(known[name].shape)
    ]
    if missing or unexpected or misshaped:
        raise AdapterError(
            f"the adapter {adapter.path} does not fit the model"
            + _section("missing from the file", missing)
            + _section("in the file, but not in the model", unexpected)
            + _section("of another shape", misshaped),
            hint="was it trained on another model, or with other target_modules?",
        )


def _section(title: str, names: Iterable[str]) -> str:
    names = list(names)
    return f"\n{len(names)} {title}:\n{listed(names)}" if names else ""
