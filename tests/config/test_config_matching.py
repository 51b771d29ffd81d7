from __future__ import annotations

import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_deploy.config import LoRAConfigError, match_pattern, match_patterns

NAMES = [
    "llama",
    "llama.layers.0",
    "llama.layers.0.self_attn",
    "llama.layers.0.self_attn.q_proj",
    "llama.layers.0.self_attn.v_proj",
    "llama.layers.0.mlp.up_proj",
    "llama.layers.1.self_attn.q_proj",
    "llama.layers.1.self_attn.v_proj",
    "norm",
    "llama.norm",
    "lm_head",
]

component = st.text(string.ascii_lowercase + string.digits + "_", min_size=1, max_size=5)
dotted = st.lists(component, min_size=1, max_size=4).map(".".join)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        (".*q_proj.*", ["llama.layers.0.self_attn.q_proj", "llama.layers.1.self_attn.q_proj"]),
        ("q_proj", ["llama.layers.0.self_attn.q_proj", "llama.layers.1.self_attn.q_proj"]),
        ("0.self_attn.q_proj", ["llama.layers.0.self_attn.q_proj"]),
        ("llama.layers.0.self_attn.q_proj", ["llama.layers.0.self_attn.q_proj"]),
        (r".*\.1\..*(q|v)_proj", NAMES[6:8]),
        ("lm_head", ["lm_head"]),
        ("norm", ["norm"]),  # a whole name wins over the same word at the end of another
        ("proj", []),
        ("attn.q_proj", []),
        ("q_proj.*", []),
    ],
)
def test_what_a_pattern_means(pattern: str, found: list[str]) -> None:
    assert match_pattern(pattern, NAMES) == found


@given(names=st.lists(dotted, unique=True, max_size=8), pattern=dotted | st.just(".*a.*"))
def test_every_full_match_of_the_reference_is_kept(names: list[str], pattern: str) -> None:
    by_reference = [name for name in names if re.fullmatch(pattern, name)]
    found = match_pattern(pattern, names)
    if by_reference:
        assert found == by_reference
    assert set(found) <= set(names)


@given(names=st.lists(dotted, min_size=1, unique=True, max_size=8), data=st.data())
def test_the_last_components_find_their_module(names: list[str], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(names))
    parts = name.split(".")
    suffix = ".".join(parts[-data.draw(st.integers(1, len(parts))) :])
    found = match_pattern(suffix, names)
    assert found
    assert all(
        f".{other}".endswith(f".{suffix}") or re.fullmatch(suffix, other) for other in found
    )
    if suffix not in names and not any(re.fullmatch(suffix, other) for other in names):
        assert name in found


def test_an_invalid_expression() -> None:
    with pytest.raises(LoRAConfigError, match=r"'\*q_proj'"):
        match_pattern("*q_proj", NAMES)


def test_l1_no_match_is_an_error_with_the_nearest_names() -> None:
    with pytest.raises(LoRAConfigError, match="'q_porj'") as caught:
        match_patterns(["q_porj"], NAMES, "target_modules")
    assert "q_proj" in (caught.value.hint or "")


def test_l1_a_plain_name_without_a_match_is_an_error_beside_others_that_match() -> None:
    with pytest.raises(LoRAConfigError, match="'query_proj'"):
        match_patterns(["v_proj", "query_proj"], NAMES, "target_modules")


def test_l1_only_expressions_none_of_which_matches() -> None:
    with pytest.raises(LoRAConfigError, match=r"'\.\*qkv\.\*', '\.\*dense\.\*'") as caught:
        match_patterns([".*qkv.*", ".*dense.*"], NAMES, "target_modules")
    assert "lm_head" in (caught.value.hint or "")


def test_an_expression_without_a_match_beside_others_warns() -> None:
    with pytest.warns(UserWarning, match=r"'\.\*qkv_proj\.\*' matches none"):
        matches = match_patterns([".*q_proj.*", ".*qkv_proj.*"], NAMES, "target_modules")
    assert len(matches[".*q_proj.*"]) == 2
    match_patterns([".*q_proj.*", ".*qkv_proj.*"], NAMES, "target_modules", quiet=True)
