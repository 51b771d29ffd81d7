"""The one name that each parameter of a model goes by."""

from __future__ import annotations

from paddle import Tensor, nn


def unique_parameters(model: nn.Layer) -> dict[str, Tensor]:
    """Structured name → parameter; one that several layers share appears once.

    It appears as the first embedding's if one is among them, as in Hugging Face's checkpoints, and otherwise under
    its first name.
    """
    owners = dict(model.named_sublayers(include_self=True, remove_duplicate=False))
    named: dict[int, tuple[str, Tensor]] = {}
    embeddings: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        is_embedding = isinstance(owners[name.rpartition(".")[0]], nn.Embedding)
        if id(parameter) not in named or (is_embedding and id(parameter) not in embeddings):
            named[id(parameter)] = name, parameter
        if is_embedding:
            embeddings.add(id(parameter))
    return dict(named.values())
