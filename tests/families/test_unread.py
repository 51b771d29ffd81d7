"""Entries of a config.json that nobody reads are named, and those that mean nothing are not."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import paddlenlp.transformers
import pytest
from model_recipes import load_recipe

import peft_deploy
from peft_deploy.base import open_base
from peft_deploy.base.dygraph import load_model
from peft_deploy.config.export import ExportOptions
from peft_deploy.families import (
    describe_unread,
    find_family,
    known_architectures,
    unread_entries,
)
from peft_deploy.families.unread import is_inert, read_entries

tiny = load_recipe("tiny")
# As they lie on the hubs, all entries included, but for lists of special tokens.
PUBLISHED: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("published_configs.json").read_text("utf-8")
)
FAMILIES = sorted({tiny.config_of(name)["architectures"][0] for name in tiny.known()})


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_raise_no_alarm(name: str) -> None:
    config = PUBLISHED[name]
    assert unread_entries(find_family(config), config) == {}


@pytest.mark.parametrize("name", tiny.known())
def test_configurations_of_paddlenlp_raise_no_alarm(name: str, tmp_path: Path) -> None:
    """Nor does what PaddleNLP saves of a model, or what goes into a bundle."""
    config = tiny.config_of(name)
    family = find_family(config)
    own = getattr(paddlenlp.transformers, family.paddle_config)(**family.paddle_arguments(config))
    own.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text("utf-8"))
    # PaddleNLP leaves out what is its class's default, though its OPT does something else than that.
    saved |= {k: config[k] for k in ("architectures", "tie_word_embeddings") if k in config}
    for one in (config, saved, family.huggingface_config(config)):
        assert unread_entries(find_family(one), one) == {}


def test_every_family_is_among_them() -> None:
    named = {find_family({"architectures": [name]}).model_type for name in known_architectures()}
    seen = {find_family(config).model_type for config in PUBLISHED.values()}
    assert named == seen == {find_family({"architectures": [n]}).model_type for n in FAMILIES}


@pytest.mark.parametrize(
    "name", ["llama", "mistral", "qwen2", "gemma", "qwen", "bloom", "opt", "gpt", "rw"]
)
def test_what_paddlenlp_configures_is_read_or_known(name: str) -> None:
    """So an entry that is named is one that PaddleNLP's class does not have, either."""
    check_arguments(tiny.config_of(name))


@pytest.mark.parametrize(
    "name", ["chatglm_v2", "t5", "bert-embedding", "roberta-answers", "ernie-tokens"]
)
def test_so_it_is_for_other_kinds(name: str) -> None:
    check_arguments(tiny.config_of(name))


def check_arguments(config: dict[str, Any]) -> None:
    family = find_family(config)
    cls = getattr(paddlenlp.transformers, family.paddle_config)
    taken = set(inspect.signature(cls.__init__).parameters) - {"self", "kwargs"}
    assert len(taken) > 8
    read = read_entries(family, config)
    assert {key for key in taken - read if not is_inert(family, key)} == set()


ASKING = [
    ("llama", {"sliding_window": 4096}),
    ("llama", {"logits_scaling": 8.0, "residual_multiplier": 0.22}),
    ("llama", {"rope_interleaved": True}),
    ("llama", {"no_rope_layers": [1, 1, 1, 0]}),
    ("llama", {"is_causal": False}),
    ("llama", {"quantization_config": {"bits": 4}}),
    ("mistral", {"layer_types": ["sliding_attention", "full_attention"]}),
    ("qwen2", {"use_qk_norm": True}),
    ("gemma", {"final_logit_softcapping": 30.0}),
    ("bloom", {"clip_qkv": 8}),
    ("opt", {"embed_scale": 2.0}),
    ("gpt", {"rotary_dim": 16}),
    ("rw", {"partial_rotary_factor": 0.5}),
    ("t5", {"scale_decoder_outputs": True}),
    ("chatglm_v2", {"attention_window": 128}),
    ("bert-embedding", {"embedding_size": 20}),
    ("roberta-answers", {"relative_attention": True}),
]


@pytest.mark.parametrize(("name", "entries"), ASKING)
def test_what_asks_for_something_else_is_named(name: str, entries: dict[str, Any]) -> None:
    config = tiny.config_of(name, **entries)
    family = find_family(config)
    assert unread_entries(family, config) == entries
    (remark,) = describe_unread(entries, family.paddle_model(config))
    assert all(f"{key} = " in remark for key in entries)


@pytest.mark.parametrize("value", [None, False, 0, [], {}])
def test_what_is_off_asks_for_nothing(value: object) -> None:
    config = tiny.config_of("llama", use_qk_norm=value)
    assert unread_entries(find_family(config), config) == {}


def test_an_export_says_so_and_the_bundle_keeps_it(tmp_path: Path) -> None:
    base = tiny.make(tmp_path / "base", "llama", residual_multiplier=0.22)
    options = ExportOptions(record_reference=True)
    said = "residual_multiplier = 0.22"
    with pytest.warns(UserWarning, match=said):
        result = peft_deploy.export(base, tmp_path / "bundle", options=options)
    assert result.parity is not None
    assert result.manifest is not None
    assert result.parity.passed  # which is why it has to be said
    reports = [
        result.parity,
        peft_deploy.validate(tmp_path / "bundle", base),
        peft_deploy.validate(tmp_path / "bundle"),
    ]
    for report in reports:
        assert sum(said in warning for warning in report.warnings) == 1
    assert result.manifest.base["unread"] == {"residual_multiplier": 0.22}


def test_a_model_in_memory_computes_what_it_computes(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    base = tiny.make(tmp_path / "base", "llama")
    model = load_model(open_base(base))
    peft_deploy.export(model, tmp_path / "bundle", options=ExportOptions(validate=False))
    assert not [w for w in recwarn if "nothing here reads" in str(w.message)]
