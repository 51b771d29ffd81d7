from __future__ import annotations

import json
import math
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_deploy.config import LORA_CONFIG_NAME, LoRAConfig, LoRAConfigError, LoRAConfigTypeError
from peft_deploy.errors import ConfigError, OutputError

REFERENCE_FILE = """{
  "base_model_name_or_path": null,
  "do_qat": false,
  "dtype": "float32",
  "enable_lora_list": null,
  "head_dim": null,
  "lora_alpha": 8,
  "lora_dropout": 0.0,
  "lora_plus_scale": 1.0,
  "lora_use_mixer": false,
  "loraga": false,
  "merge_weights": false,
  "pissa": false,
  "r": 4,
  "rslora": false,
  "scaling": 2.0,
  "target_modules": [
    ".*q_proj"
  ],
  "tensor_parallel_degree": 1,
  "trainable_bias": null,
  "trainable_modules": [
    "llama.norm.weight"
  ],
  "use_mora": false,
  "use_quick_lora": false
}"""

names = st.text(string.ascii_letters + "_.*", min_size=1, max_size=12)
configs = st.builds(
    LoRAConfig,
    r=st.integers(1, 512),
    target_modules=st.none() | names | st.lists(names, max_size=4),
    trainable_modules=st.none() | st.lists(names, max_size=3),
    lora_alpha=st.integers(-64, 512) | st.floats(-8, 512),
    lora_dropout=st.floats(0, 0.99),
    trainable_bias=st.sampled_from([None, "lora", "all"]),
    tensor_parallel_degree=st.sampled_from([-1, 1, 2, 4]),
    dtype=st.sampled_from([None, "float32", "float16", "bfloat16"]),
    rslora=st.booleans(),
    pissa=st.booleans(),
    lora_plus_scale=st.floats(0.1, 64),
    base_model_name_or_path=st.none() | st.text(max_size=20),
)


def write(folder: Path, **values: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / LORA_CONFIG_NAME).write_text(json.dumps(values), encoding="utf-8")
    return folder


@given(config=configs)
def test_round_trip_through_the_file(
    config: LoRAConfig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("config")
    config.save_pretrained(folder)
    assert LoRAConfig.from_pretrained(folder) == config
    assert [path.name for path in folder.iterdir()] == [LORA_CONFIG_NAME]


def test_the_file_is_the_reference_s_to_the_byte(tmp_path: Path) -> None:
    config = LoRAConfig(
        r=4,
        target_modules=[".*q_proj"],
        trainable_modules=["llama.norm.weight"],
        dtype="float32",
        tensor_parallel_degree=1,
    )
    config.save_pretrained(tmp_path / "new" / "folder")
    written = (tmp_path / "new" / "folder" / LORA_CONFIG_NAME).read_text(encoding="utf-8")
    assert written == REFERENCE_FILE


@pytest.mark.parametrize(
    ("options", "scaling"),
    [
        ({"r": 4, "lora_alpha": 6}, 1.5),
        ({"r": 9, "lora_alpha": 6, "rslora": True}, 2.0),
        ({"r": 9, "lora_alpha": 6, "pissa": True}, 1.0),
        ({"r": 9, "lora_alpha": 6, "pissa": True, "rslora": True}, 1.0),
    ],
)
def test_scaling(options: dict, scaling: float) -> None:
    assert LoRAConfig(**options).scaling == pytest.approx(scaling)


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    LoRAConfig(r=4, lora_alpha=8).save_pretrained(tmp_path)
    config = LoRAConfig.from_pretrained(tmp_path, r=16, rslora=True)
    assert (config.r, config.lora_alpha, config.scaling) == (16, 8, 8 / math.sqrt(16))


@pytest.mark.parametrize(
    "feature", ["do_qat", "loraga", "use_mora", "lora_use_mixer", "nola", "lorapro", "quantized"]
)
def test_a_feature_that_is_not_there_is_refused_by_name(tmp_path: Path, feature: str) -> None:
    write(tmp_path, r=4, **{feature: False})
    assert LoRAConfig.from_pretrained(tmp_path).r == 4
    write(tmp_path, r=4, **{feature: True})
    with pytest.raises(LoRAConfigError, match=feature):
        LoRAConfig.from_pretrained(tmp_path)


def test_a_feature_of_the_reference_is_refused_in_the_constructor() -> None:
    with pytest.raises(LoRAConfigError, match="MoRA"):
        LoRAConfig(use_mora=True)


def test_unknown_keys_warn_with_the_nearest_name(tmp_path: Path) -> None:
    write(tmp_path, r=4, lora_alfa=16)
    with pytest.warns(UserWarning, match=r"lora_alfa.*did you mean lora_alpha"):
        config = LoRAConfig.from_pretrained(tmp_path)
    assert config.lora_alpha == 8


def test_the_name_that_a_fork_gave_the_parallel_degree(tmp_path: Path) -> None:
    write(tmp_path, r=4, tensor_model_parallel_size=2)
    assert LoRAConfig.from_pretrained(tmp_path).tensor_parallel_degree == 2


def test_a_scaling_that_contradicts_the_rest_of_the_file(tmp_path: Path) -> None:
    write(tmp_path, r=4, lora_alpha=8, scaling=4.0)
    with pytest.raises(LoRAConfigError, match=r"scaling 4\.0.*give 2\.0"):
        LoRAConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 0},
        {"r": -1},
        {"r": 2.0},
        {"r": True},
        {"lora_alpha": math.nan},
        {"lora_alpha": "8"},
        {"lora_dropout": 1.0},
        {"lora_dropout": -0.1},
        {"trainable_bias": "none"},
        {"enable_lora_list": [True, False], "target_modules": "qkv"},
    ],
)
def test_values_out_of_range(options: dict) -> None:
    with pytest.raises(LoRAConfigError) as caught:
        LoRAConfig(**options)
    assert isinstance(caught.value, ValueError)
    assert caught.value.exit_code == ConfigError.exit_code == 2


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "qkv", "enable_lora_list": [[True]], "head_dim": 4},
        {"target_modules": ["qkv"], "enable_lora_list": [True], "head_dim": 4},
        {"target_modules": ["qkv"], "enable_lora_list": [None, None], "head_dim": 4},
        {"target_modules": ["qkv"], "enable_lora_list": True, "head_dim": 4},
        {"target_modules": [1]},
        {"trainable_modules": 3},
    ],
)
def test_values_of_the_wrong_form(options: dict) -> None:
    with pytest.raises(LoRAConfigTypeError) as caught:
        LoRAConfig(**options)
    assert isinstance(caught.value, TypeError)


def test_enabled_parts_for_each_target() -> None:
    single = LoRAConfig(target_modules="qkv", enable_lora_list=[True, False], head_dim=4)
    assert single.enabled_parts() == [[True, False]]
    several = LoRAConfig(
        target_modules=["qkv", "out"], enable_lora_list=[[True, False], None], head_dim=4
    )
    assert several.enabled_parts() == [[True, False], None]
    assert LoRAConfig(target_modules=["a", "b"]).enabled_parts() == [None, None]


def test_one_string_is_one_pattern() -> None:
    config = LoRAConfig(target_modules=".*q_proj", trainable_modules="lm_head")
    assert config.target_patterns == [".*q_proj"]
    assert config.trainable_patterns == ["lm_head"]


def test_quick_lora_goes_off_with_dropout() -> None:
    assert LoRAConfig(use_quick_lora=True).use_quick_lora
    with pytest.warns(UserWarning, match="use_quick_lora"):
        assert not LoRAConfig(use_quick_lora=True, lora_dropout=0.1).use_quick_lora


def test_merge_weights_is_deprecated() -> None:
    with pytest.warns(DeprecationWarning, match="merge_weights"):
        LoRAConfig(merge_weights=True)


def test_no_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Can't find lora_config\.json"):
        LoRAConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str) -> None:
    (tmp_path / LORA_CONFIG_NAME).write_text(text, encoding="utf-8")
    with pytest.raises(LoRAConfigError, match=LORA_CONFIG_NAME):
        LoRAConfig.from_pretrained(tmp_path)


def test_saving_to_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("", encoding="utf-8")
    with pytest.raises(OutputError, match="is a file"):
        LoRAConfig().save_pretrained(tmp_path / "taken")
