"""The one name that each parameter of a model goes by."""

from __future__ import annotations

from paddle import Tensor, nn


def unique_parameters(model: nn.Layer) -> dict[str, Tensor]:
    """Structured name → parameter; one that several layers share appears once.

    It appears as the embedding's if it is one of them, as in Hugging Face's checkpoints, and otherwise under its
    first name.
    """
    owners = dict(model.named_sublayers(include_self=True))
    named: dict[int, tuple[str, Tensor]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = owners[name.rpartition(".")[0]]
        if id(parameter) not in named or isinstance(owner, nn.Embedding):
            named[id(parameter)] = name, parameter
    return dict(named.values())
