"""Prefixes through the same training as LoRA."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from peft_deploy.adapters import read_adapter
from peft_deploy.adapters.formats.prefix import read_prefix
from peft_deploy.base import open_base
from peft_deploy.cli import cli
from peft_deploy.config import LoRAConfig, PrefixConfig
from peft_deploy.errors import ConfigError
from peft_deploy.training import TrainOptions, train

pytestmark = pytest.mark.filterwarnings(r"ignore:[\s\S]*swiglu")

WORDS = ("the", "other", "thing", "in", "water", "sand", "over", "ring", "all", "bread")
P = 5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    lines = [{"prompt": f"{a}, {a} ", "completion": "then"} for a in WORDS]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def options(base: Path, data: Path, output: Path, **other: Any) -> TrainOptions:
    given: dict[str, Any] = {
        "method": "prefix",
        "prefix": PrefixConfig(num_prefix_tokens=P, prefix_projection=True, prefix_dropout=0.1),
        "batch_size": 2,
        "gradient_accumulation": 2,
        "max_steps": 4,
        "learning_rate": 3e-2,
    }
    return TrainOptions(base=base, data=data, output=output, **{**given, **other})


def weights(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in read_prefix(folder).state.items()}


def test_a_prefix_is_learned_and_a_resumed_run_ends_in_the_same_one(
    tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    full = tmp_path / "full"
    result = train(options(tiny_llama, data, full, save_steps=1, keep_checkpoints=9))
    assert result.steps == 4
    checkpoint = full / "checkpoint-1"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"prefix_model_state.pdparams", "prefix_config.json", "pre_caches.npy"} <= names
    assert not any(name.startswith(("model_state", "lora")) for name in names)
    provenance = read_prefix(full).provenance
    assert provenance is not None
    assert provenance.base_fingerprint == open_base(tiny_llama).fingerprint

    output = tmp_path / "again"
    shutil.copytree(checkpoint, output / "checkpoint-1")
    train(options(tiny_llama, data, output, save_steps=1, resume="auto"))
    wanted, found, between = weights(full), weights(output), weights(checkpoint)
    assert wanted.keys() == found.keys() and len(wanted) == 5
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)
        assert np.abs(array - between[name]).max() > 1e-4

    train(options(tiny_llama, data, output, force=True, max_steps=1))
    assert not list(output.glob("checkpoint-*"))


def test_only_the_prefix_changes_and_the_loss_falls(
    tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    from peft_deploy.base.dygraph import load_model

    prefix = PrefixConfig(num_prefix_tokens=P)
    result = train(
        options(tiny_llama, data, tmp_path / "a", prefix=prefix, max_steps=20, learning_rate=0.3)
    )
    assert result.last_loss < 0.8 * result.first_loss
    before = dict(load_model(open_base(tiny_llama)).named_parameters())
    for name, parameter in result.model.model.named_parameters():
        np.testing.assert_array_equal(parameter.numpy(), before[name].numpy())
    caches = np.load(tmp_path / "a" / "pre_caches.npy")
    assert caches.shape[:2] == (2, 2) and caches.shape[3] == P and np.abs(caches).max() > 0.5


def test_an_example_leaves_room_for_the_prefix(
    make_tiny_llama: Any, data: Path, tmp_path: Path
) -> None:
    base = make_tiny_llama(max_position_embeddings=24)
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"text": "water and sand " * 40}) + "\n", "utf-8")
    short = {"batch_size": 1, "gradient_accumulation": 1, "max_steps": 1}
    result = train(options(base, long, tmp_path / "a", **short))
    assert f"longer than {24 - P} tokens" in result.remarks[0]
    with pytest.raises(ConfigError, match="num_prefix_tokens is 23, and the model has 24"):
        prefix = PrefixConfig(num_prefix_tokens=23)
        train(options(base, long, tmp_path / "b", prefix=prefix, **short))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"prefix": None}, "needs num_prefix_tokens"),
        ({"prefix": PrefixConfig()}, "needs num_prefix_tokens"),
        ({"lora": LoRAConfig()}, "options of lora are given"),
        ({"method": "lora"}, "options of prefix are given"),
        ({"method": "p-tuning"}, "one of lora, prefix"),
        (
            {"prefix": PrefixConfig(num_prefix_tokens=2, prefix_projection_hidden_size=8)},
            "there is no projection",
        ),
    ],
)
def test_options_that_do_not_go_together(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        options(Path("base"), Path("data"), Path("out"), **wrong)


def command(base: Path, data: Path, output: Path, *more: str) -> list[str]:
    given = ["train", "--base", str(base), "--data", str(data), "--output", str(output)]
    return [*given, "--learning-rate", "3e-2", "--max-steps", "2", *more]


def test_the_command_passes_every_option_of_a_prefix(
    tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    sizes = ("--num-prefix-tokens", "3", "--prefix-projection", "--prefix-dropout", "0.25")
    hidden = ("--prefix-projection-hidden-size", "12")
    line = command(tiny_llama, data, tmp_path / "a", "--method", "prefix", *sizes, *hidden)
    result = CliRunner().invoke(cli, line)
    assert result.exit_code == 0, result.output
    read = read_prefix(tmp_path / "a")
    assert (read.num_tokens, read.config.prefix_dropout) == (3, 0.25)
    assert read.state["1.weight"].shape[1] == 12


@pytest.mark.parametrize(
    ("method", "option", "value"),
    [
        ("prefix", "--lora-alpha", "16"),
        ("prefix", "--lora-r", "8"),
        ("lora", "--prefix-dropout", "0.0"),
    ],
)
def test_options_of_the_other_method_are_refused_not_ignored(
    data: Path, tmp_path: Path, method: str, option: str, value: str
) -> None:
    line = command(tmp_path, data, tmp_path / "a", "--method", method, option, value)
    result = CliRunner().invoke(cli, line)
    assert result.exit_code == 2
    assert f"--method {method} has no {option}" in result.stderr


def test_a_bad_line_is_said_without_paddle(data: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(data.read_text("utf-8") + '{"promt": "x"}\n', "utf-8")
    line = command(tmp_path, bad, tmp_path / "a")
    script = (
        "import sys\nsys.modules['paddle'] = sys.modules['paddlenlp'] = None\n"
        f"from peft_deploy.cli import cli\ncli({line!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2, done.stderr
    assert "line 11" in done.stderr


def test_a_lora_adapter_says_which_weights_it_was_trained_on(
    tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    lora = LoRAConfig(r=2, lora_alpha=4)
    train(options(tiny_llama, data, tmp_path, method="lora", prefix=None, lora=lora, max_steps=1))
    provenance = read_adapter(tmp_path).provenance
    assert provenance is not None
    assert provenance.base_fingerprint == open_base(tiny_llama).fingerprint


@pytest.mark.slow
def test_two_processes_learn_the_prefix_that_one_learns_with_batches_twice_as_large(
    tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    """Each completion is "then": as many tokens in every example, so the mean of means is the mean."""
    prefix = ("--method", "prefix", "--num-prefix-tokens", "4", "--batch-size")
    launch = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2"]
    tool = str(Path(sys.executable).with_name("peft-deploy"))
    done = subprocess.run(
        [
            *(*launch, "--backend", "gloo", "--log_dir", str(tmp_path / "log"), tool),
            *command(tiny_llama, data, tmp_path / "two", *prefix, "2"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one = CliRunner().invoke(cli, command(tiny_llama, data, tmp_path / "one", *prefix, "4"))
    assert one.exit_code == 0, one.output
    small = CliRunner().invoke(cli, command(tiny_llama, data, tmp_path / "small", *prefix, "2"))
    assert small.exit_code == 0, small.output
    found, wanted = weights(tmp_path / "two"), weights(tmp_path / "one")
    alone = weights(tmp_path / "small")
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=1e-5)
        assert np.abs(alone[name] - array).max() > 1e-2  # one process alone learns another


def test_recomputation_ends_in_the_same_prefix(
    tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    prefix = PrefixConfig(num_prefix_tokens=P, prefix_projection=True)
    short = {"prefix": prefix, "max_steps": 2, "learning_rate": 1e-3}
    first = train(options(tiny_llama, data, tmp_path / "kept", **short))
    second = train(options(tiny_llama, data, tmp_path / "twice", recompute=True, **short))
    assert not first.model.model.llama.enable_recompute
    assert second.model.model.llama.enable_recompute
    kept, twice = weights(tmp_path / "kept"), weights(tmp_path / "twice")
    for name, array in kept.items():
        np.testing.assert_allclose(twice[name], array, rtol=1e-4, atol=1e-5, err_msg=name)
