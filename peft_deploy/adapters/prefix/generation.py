"""Generation behind a prefix without touching the model."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import paddle
from paddle import nn


def generation_view(
    model: nn.Layer,
    prepare: Callable[..., dict[str, Any]],
    call: Callable[..., Any] | None = None,
) -> nn.Layer:
    """A model with the same parameters and layers, whose steps of generation are prepared by us.

    What generation changes about it (and PaddleNLP's does change attributes) ends with it, so an
    error leaves no trace in the model, and threads do not meet.

    Args:
        model: the model.
        prepare: gets the model's own ``prepare_inputs_for_generation`` and its arguments.
        call: gets the arguments of every step in place of the model, which it calls; None where the
            model needs no help.
    """
    view = copy.copy(model)
    if call is not None:
        vars(view)["forward"] = call  # PaddleNLP warns of a forward that is set
        # They are those of the model that is called.
        view._forward_pre_hooks, view._forward_post_hooks = OrderedDict(), OrderedDict()
    view.prepare_inputs_for_generation = partial(prepare, view.prepare_inputs_for_generation)
    return view


def token_mask(
    model: nn.Layer, input_ids: paddle.Tensor, options: Mapping[str, Any]
) -> paddle.Tensor:
    """The mask of a prompt that came without one: padding is left out.

    By PaddleNLP's rule: tokens equal to ``pad_token_id`` are padding unless that is an end token,
    too. Its own mask is an additive one in many models, which they then take for a keep-mask.

    Args:
        model: the model.
        input_ids: [B, S].
        options: of generation.

    Returns:
        [B, S], int64.
    """
    pad = _token(model, options, "pad_token_id")
    end = _token(model, options, "eos_token_id")
    ends = end if isinstance(end, (list, tuple)) else [end]
    if pad is None or pad in ends:
        return paddle.ones(input_ids.shape, dtype="int64")
    return (input_ids != pad).astype("int64")


def _token(model: nn.Layer, options: Mapping[str, Any], name: str) -> Any:
    generation = options.get("generation_config") or getattr(model, "generation_config", None)
    places = (
        options.get(name),
        getattr(generation, name, None),
        getattr(model.config, name, None),
    )
    return next((value for value in places if value is not None), None)
