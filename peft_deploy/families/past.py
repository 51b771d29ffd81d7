"""How PaddleNLP's own models take a past (keys and values) that they have not computed themselves.

Prefix-tuning needs this of models which no :class:`~peft_deploy.families.family.DecoderFamily`
describes yet, so it is a table of its own, keyed by PaddleNLP's ``base_model_prefix``, or by
``model_type`` where several models share the former.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft_deploy.errors import UnsupportedModelError
from peft_deploy.families.family import LAYER_KEYS, Family
from peft_deploy.families.registry import find_family


@dataclass(frozen=True)
class PastRule:
    """What one of PaddleNLP's models does with a past.

    Args:
        layout: axes of one layer's keys: a permutation of ``"BSKD"`` (batch, sequence, kv heads,
            head dim).
        positions_after_past: where positions start that are not given: at the past's length, or
            at 0.
        takes_positions: whether ``position_ids`` [B, S] mean something to the model.
        takes_3d_masks: whether a mask [B, S, T] is taken for what it is.
        takes_4d_masks: whether a mask [B, 1, S, T] is taken.
        takes_embeddings: whether ``inputs_embeds`` may come without ``input_ids``.
        max_positions: key of the largest number of positions in config.json; None where the model
            has no such limit.
        parallel_prefix: whether paddlenlp.peft splits a prefix over tensor-parallel ranks; where it
            does not, it writes -1 for their number.
        cache_class: ``module:name`` of what a layer's key and value have to be wrapped in; None for
            a plain pair.
        call: ``module:name`` of ``f(model, arguments, num_prefix_tokens)``, which calls a model that
            computes something else than it is given to, and puts that right; None calls it.
        hands_on_past: whether ``prepare_inputs_for_generation`` hands on the past that PaddleNLP's
            ``generate`` keeps; where it does not, every step runs over the whole text.
    """

    layout: str
    positions_after_past: bool = False
    takes_positions: bool = True
    takes_3d_masks: bool = True
    takes_4d_masks: bool = True
    takes_embeddings: bool = True
    max_positions: str | None = "max_position_embeddings"
    parallel_prefix: bool = True
    cache_class: str | None = None
    call: str | None = None
    hands_on_past: bool = True


_RULES = {
    "bloom": PastRule("BSKD", takes_positions=False, max_positions=None),  # ALiBi
    "chatglm": PastRule("SBKD", takes_positions=False, takes_embeddings=False, max_positions=None),
    "chatglm_v2": PastRule(
        "SBKD",
        takes_embeddings=False,
        max_positions="max_sequence_length",
        parallel_prefix=False,
    ),
    "gemma": PastRule("BSKD"),
    "gpt": PastRule("BSKD", positions_after_past=True, takes_3d_masks=False),
    "llama": PastRule("BSKD"),
    "mistral": PastRule("BKSD", positions_after_past=True),
    "opt": PastRule(
        "BKSD",
        positions_after_past=True,
        takes_positions=False,  # it counts them in the mask
        takes_3d_masks=False,
        takes_4d_masks=False,
        cache_class="paddlenlp.transformers.opt.modeling:MultiHeadAttention.Cache",
    ),
    "qwen": PastRule("BSKD", max_positions=None),  # its table of rotations grows
    "qwen2": PastRule("BSKD"),
    # Behind a prefix this class fails by itself, and so does paddlenlp.peft on it: see what calls it.
    "RefinedWeb": PastRule(
        "BKSD",
        takes_3d_masks=False,
        takes_4d_masks=False,
        max_positions=None,  # its table of rotations grows
        call="peft_deploy.families.eager_repairs:call_with_flat_cache",
        hands_on_past=False,
    ),
}


@dataclass(frozen=True)
class PastDims:
    """The sizes that decide the shape of a past; None for what a configuration does not say."""

    num_layers: int | None = None
    hidden_size: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    max_positions: int | None = None


# Under which names the configurations of PaddleNLP's models keep the sizes, the usual one first.
_HIDDEN = ("hidden_size", "n_embed", "n_embd", "d_model")
_HEADS = ("num_attention_heads", "n_head", "num_heads")
_KV_HEADS = ("num_key_value_heads", "multi_query_group_num", "num_kv_heads")
_HEAD_DIM = ("head_dim", "kv_channels")
_ROPE_SCALING = ("rope_scaling", "rope_scaling_type")


def known_past_rules() -> list[str]:
    """The name of every model whose past is described, sorted."""
    return sorted(_RULES)


def find_past_rule(*names: str | None) -> PastRule | None:
    """What a model does with a past; None for one that is not described.

    Args:
        names: its ``base_model_prefix``, its ``model_type``; the first that is known decides.
    """
    return next((_RULES[name] for name in names if name in _RULES), None)


def past_rule_of(family: Family, config: Mapping[str, Any]) -> PastRule | None:
    """What a family's models do with a past; None for one that is not described.

    PaddleNLP's models keep the model without its head under the name that is its ``base_model_prefix``, so that
    parameters begin with it.

    Args:
        family: a family of decoders.
        config: contents of config.json.
    """
    roots = (rule.paddle.partition(".")[0] for rule in family.names(config).rules)
    return find_past_rule(*roots, family.model_type)


def past_dims(config: Mapping[str, Any], rule: PastRule | None) -> PastDims:
    """The sizes of a model's past, from its config.json.

    Args:
        config: contents of config.json.
        rule: what :func:`find_past_rule` says about the model.
    """
    try:
        known = find_family(config).dims(config)
    except (UnsupportedModelError, KeyError):
        return _from_usual_keys(config, rule)
    return PastDims(
        known.num_layers,
        known.hidden_size,
        known.num_heads,
        known.num_kv_heads,
        known.head_dim,
        None if rule is not None and rule.max_positions is None else known.max_positions,
    )


def _from_usual_keys(config: Mapping[str, Any], rule: PastRule | None) -> PastDims:
    hidden, heads = _first(config, _HIDDEN), _first(config, _HEADS)
    head_dim = _first(config, _HEAD_DIM)
    if head_dim is None and hidden is not None and heads is not None:
        head_dim = hidden // heads
    limit = None
    # Scaled rotations reach further than the key says, each kind in its own way.
    if rule is not None and rule.max_positions and not any(map(config.get, _ROPE_SCALING)):
        limit = _first(config, (rule.max_positions,))
    return PastDims(
        num_layers=_first(config, LAYER_KEYS),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=_first(config, _KV_HEADS) or heads,
        head_dim=head_dim,
        max_positions=limit,
    )


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    """The first of the keys that holds a positive integer."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
