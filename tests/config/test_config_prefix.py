from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_deploy.config import PrefixConfig, PrefixConfigError
from peft_deploy.errors import ConfigError, OutputError

DEFAULTS = {
    "prefix_dropout": 0.0,
    "num_prefix_tokens": None,
    "num_attention_heads": None,
    "multi_query_group_num": None,
    "num_hidden_layers": None,
    "hidden_size": None,
    "prefix_projection": False,
    "prefix_projection_hidden_size": None,
    "tensor_parallel_degree": -1,
    "dtype": None,
}
SIZES = [name for name in DEFAULTS if name.startswith("num_") or "size" in name or "group" in name]


def test_names_order_and_defaults() -> None:
    assert PrefixConfig().to_dict() == DEFAULTS
    assert [field.name for field in fields(PrefixConfig)] == list(DEFAULTS)


@pytest.mark.parametrize("value", [0, -1, 2.0, "8", True])
@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_positive_integers(name: str, value: Any) -> None:
    with pytest.raises(PrefixConfigError, match=f"{name} is {value!r}; it has to be a positive"):
        PrefixConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("prefix_dropout", 1.0, r"in \[0, 1\)"),
        ("prefix_dropout", -0.1, r"in \[0, 1\)"),
        ("prefix_dropout", float("nan"), r"in \[0, 1\)"),
        ("prefix_dropout", "0.1", r"in \[0, 1\)"),
        ("prefix_dropout", True, r"in \[0, 1\)"),
        ("prefix_projection", "yes", "True or False"),
        ("tensor_parallel_degree", None, "an integer"),
        ("dtype", "float8", "one of float32, float16, bfloat16, float64"),
    ],
)
def test_other_options(name: str, value: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text) as error:
        PrefixConfig(**{name: value})
    assert isinstance(error.value, ConfigError) and error.value.exit_code == 2
    assert name in error.value.message and repr(value) in error.value.message


def test_groups_divide_the_heads() -> None:
    with pytest.raises(
        PrefixConfigError, match=r"multi_query_group_num is 3; .* num_attention_hea"
    ):
        PrefixConfig(num_attention_heads=4, multi_query_group_num=3)


@pytest.mark.parametrize(
    ("heads", "groups", "wanted"), [(None, None, None), (8, None, 8), (8, 2, 2), (None, 2, 2)]
)
def test_key_and_value_heads(heads: int | None, groups: int | None, wanted: int | None) -> None:
    config = PrefixConfig(num_attention_heads=heads, multi_query_group_num=groups)
    assert config.num_kv_heads == wanted


size = st.none() | st.integers(1, 100_000)


@given(
    st.builds(
        PrefixConfig,
        prefix_dropout=st.floats(0, 1, exclude_max=True),
        num_prefix_tokens=size,
        num_hidden_layers=size,
        hidden_size=size,
        multi_query_group_num=size,
        prefix_projection=st.booleans(),
        prefix_projection_hidden_size=size,
        tensor_parallel_degree=st.integers(-1, 8),
        dtype=st.sampled_from([None, "float32", "float16", "bfloat16"]),
    )
)
def test_a_config_on_disk_is_the_same(
    tmp_path_factory: pytest.TempPathFactory, config: PrefixConfig
) -> None:
    folder = tmp_path_factory.mktemp("config")
    config.save_pretrained(folder)
    assert PrefixConfig.from_pretrained(folder) == config
    assert json.loads((folder / "prefix_config.json").read_text()) == config.to_dict()


def test_the_file_is_sorted_and_keywords_win(tmp_path: Path) -> None:
    PrefixConfig(num_prefix_tokens=4).save_pretrained(tmp_path)
    path = tmp_path / "prefix_config.json"
    assert path.read_text() == json.dumps(
        {**DEFAULTS, "num_prefix_tokens": 4}, indent=2, sort_keys=True
    )
    assert PrefixConfig.from_pretrained(tmp_path, num_prefix_tokens=9).num_prefix_tokens == 9
    with pytest.raises(TypeError):
        PrefixConfig.from_pretrained(tmp_path, tokens=9)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Can't find prefix_config\.json at"):
        PrefixConfig.from_pretrained(tmp_path)
    path = tmp_path / "prefix_config.json"
    for text, message in (
        ("{", "cannot be read"),
        ("[1]", "holds a list, not an object"),
        ('{"num_prefix_tokens": 0}', "positive integer"),
    ):
        path.write_text(text)
        with pytest.raises(PrefixConfigError, match=message):
            PrefixConfig.from_pretrained(tmp_path)
    path.write_text('{"num_prefix_token": 3}')
    with pytest.warns(UserWarning, match="num_prefix_token, .*; did you mean num_prefix_tokens"):
        assert PrefixConfig.from_pretrained(tmp_path).num_prefix_tokens is None
    with pytest.raises(OutputError, match="is a file"):
        PrefixConfig().save_pretrained(path)
