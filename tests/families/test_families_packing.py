"""Which linear layers each family has packed, by the names of its parameters alone."""

from __future__ import annotations

import pytest
from model_recipes import load_recipe

from peft_deploy.families import find_family, find_packed

tiny = load_recipe("tiny")

QKV, GATE_UP = "q_proj k_proj v_proj", "gate_proj up_proj"
# What is in the packed layers of one of a model's layers, and of T5's of all of them; nothing where PaddleNLP keeps
# such layers in one weight anyway.
WANTED = {
    "bert": {QKV},
    "roberta": {QKV},
    "ernie": {QKV},
    "gpt": {QKV},
    "opt": {QKV},
    "llama": {QKV, GATE_UP},
    "mistral": {QKV, GATE_UP},
    "gemma": {QKV, GATE_UP},
    "qwen2": {QKV, GATE_UP},
    "qwen": {"w2 w1"},
    "t5": {"q k v", "k v"},
    "bloom": set(),
    "chatglm_v2": set(),
    "RefinedWeb": set(),
}
VARIANTS = {
    "llama-fused": set(),
    "gpt-fused-post-norm": set(),
    "t5-gated": {"q k v", "k v", "wi_0 wi_1"},
}
BIASED = {"bert", "roberta", "ernie", "gpt", "opt", "qwen2"}


@pytest.mark.parametrize("name", tiny.known())
def test_every_layer_is_packed(name: str) -> None:
    config = tiny.config_of(name)
    family = find_family(config)
    layers = family.dims(config).num_layers
    found = find_packed(family.pack_rules(config), family.names(config).parameters(layers))
    kinds = {" ".join(part.rpartition(".")[2] for part in group.parts) for group in found}
    if name in VARIANTS:
        assert kinds == VARIANTS[name]
    elif "fused" not in name:
        assert kinds == WANTED[family.model_type]
    parts = [part for group in found for part in group.parts]
    assert len(set(parts)) == len(parts)
    assert len({group.module for group in found}) == len(found)
    assert not {group.module for group in found} & set(parts)
    if family.model_type != "t5":
        assert len(found) == len(kinds) * layers
    if family.model_type in BIASED:
        assert [g.biased for g in found] == ["q_proj" in g.parts[0] for g in found]
