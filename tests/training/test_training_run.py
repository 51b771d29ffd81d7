from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_deploy.adapters import read_adapter
from peft_deploy.adapters.lora import LoRAModel
from peft_deploy.base import open_base
from peft_deploy.base.dygraph import load_model
from peft_deploy.config import LoRAConfig
from peft_deploy.errors import CheckpointError, ConfigError, OutputError
from peft_deploy.text import Tokenizer
from peft_deploy.training import TrainOptions, encode_records, read_records, train
from peft_deploy.training.batches import IGNORED, Collator
from peft_deploy.training.loss import completion_loss

# PaddleNLP's own use of a function that Paddle has renamed.
pytestmark = pytest.mark.filterwarnings(r"ignore:[\s\S]*swiglu")

WORDS = ("the", "other", "thing", "in", "water", "sand", "over", "ring", "all", "bread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    lines = [
        {"prompt": f"{word}, {WORDS[i - 3]} ", "completion": f"then {WORDS[i - 1]}"}
        for i, word in enumerate(WORDS)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def options(base: Path, data: Path, output: Path, **other: Any) -> TrainOptions:
    """10 examples in 5 batches of 2: with 2 batches a step, each epoch has 2 steps and a rest."""
    given: dict[str, Any] = {
        "lora": LoRAConfig(r=4, lora_alpha=8, lora_dropout=0.2),
        "batch_size": 2,
        "gradient_accumulation": 2,
        "max_steps": 5,
        "learning_rate": 3e-2,
        "logging_steps": 2,
    }
    return TrainOptions(base=base, data=data, output=output, **{**given, **other})


def weights(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in read_adapter(folder).state.items()}


@pytest.fixture(scope="module")
def full_run(tiny_llama: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint after each of its five steps."""
    output = tmp_path_factory.mktemp("run") / "adapter"
    train(options(tiny_llama, data, output, save_steps=1, keep_checkpoints=9))
    return output


def test_training_changes_every_matrix_and_lowers_the_loss(
    tiny_llama: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "adapter"
    result = train(
        options(tiny_llama, data, output, max_steps=25, lora=LoRAConfig(r=4, lora_alpha=8))
    )
    assert result.steps == 25
    assert result.last_loss < 0.7 * result.first_loss
    state = weights(output)
    assert len(state) == 2 * 2 * 7  # A and B of seven linear layers in each of two layers
    assert all(np.abs(array).max() > 1e-2 for array in state.values())
    assert result.trained_parameters == sum(array.size for array in state.values())
    assert capfd.readouterr() == ("", "")

    import paddle

    ids = paddle.to_tensor([[1, 20, 30, 40, 50]])
    base = load_model(open_base(tiny_llama))
    plain = base(ids)[0].numpy()
    loaded = LoRAModel.from_pretrained(base, output)
    loaded.eval()
    assert np.abs(loaded(ids)[0].numpy() - plain).max() > 0.1
    np.testing.assert_array_equal(loaded(ids)[0].numpy(), result.model(ids)[0].numpy())


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_resumed_run_ends_in_the_same_weights(
    tiny_llama: Path, data: Path, full_run: Path, tmp_path: Path, step: int
) -> None:
    """From the middle of an epoch (1, 3) and from its end (2), with dropout."""
    output = tmp_path / "adapter"
    shutil.copytree(full_run / f"checkpoint-{step}", output / f"checkpoint-{step}")
    result = train(options(tiny_llama, data, output, save_steps=1, resume="auto"))
    assert result.steps == 5
    wanted, found = weights(full_run), weights(output)
    between = weights(full_run / f"checkpoint-{step}")
    assert wanted.keys() == found.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)
        assert np.abs(array - between[name]).max() > 1e-4  # and there was something left to learn


def test_the_same_options_give_the_same_weights_and_another_seed_others(
    tiny_llama: Path, data: Path, full_run: Path, tmp_path: Path
) -> None:
    train(options(tiny_llama, data, tmp_path / "again"))
    train(options(tiny_llama, data, tmp_path / "other", seed=7))
    wanted = weights(full_run)
    again, other = weights(tmp_path / "again"), weights(tmp_path / "other")
    assert all(np.array_equal(again[name], array) for name, array in wanted.items())
    assert all(np.abs(other[name] - array).max() > 1e-3 for name, array in wanted.items())


def test_metrics_checkpoints_and_record_lie_in_the_folder(full_run: Path) -> None:
    entries = [json.loads(line) for line in (full_run / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [2, 4]
    assert all(entry["loss"] > 0 for entry in entries)
    assert sorted(p.name for p in full_run.glob("checkpoint-*")) == [
        f"checkpoint-{n}" for n in range(1, 6)
    ]
    record = json.loads((full_run / "train_options.json").read_text())
    assert record == json.loads((full_run / "checkpoint-5" / "train_options.json").read_text())
    assert len(record["data_sha256"]) == 64
    assert not list(full_run.glob(".*"))


def test_the_loss_is_the_mean_over_the_completions(tiny_llama: Path, data: Path) -> None:
    import paddle

    tokenizer = Tokenizer.from_folder(tiny_llama)
    encoded = encode_records(read_records(data)[:3], tokenizer, 64, data)
    batch = Collator(tokenizer.pad_id)(encoded.examples)
    model = load_model(open_base(tiny_llama))
    inputs = {name: paddle.to_tensor(array) for name, array in batch.items()}
    found = float(completion_loss(model, inputs))

    losses = []
    for example in encoded.examples:  # one at a time, without padding, in float64
        logits = model(paddle.to_tensor([example.ids]))[0].numpy()[0].astype(np.float64)  # [S, V]
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses += [
            -logp[at - 1, example.ids[at]]
            for at in range(1, len(example.ids))
            if example.learned[at]
        ]
    assert len(losses) == (batch["labels"] != IGNORED).sum()
    assert found == pytest.approx(np.mean(losses), rel=1e-5)


def test_evaluation_data_is_measured_not_trained(
    tiny_llama: Path, data: Path, full_run: Path, tmp_path: Path
) -> None:
    result = train(options(tiny_llama, data, tmp_path / "a", eval_data=data, eval_steps=2))
    wanted = weights(full_run)
    assert all(np.array_equal(a, wanted[n]) for n, a in weights(tmp_path / "a").items())
    lines = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    measured = [entry for entry in map(json.loads, lines) if "eval_loss" in entry]
    assert [entry["step"] for entry in measured] == [2, 4, 5]
    assert result.eval_loss == pytest.approx(measured[-1]["eval_loss"])


def test_a_loss_that_is_no_number_ends_the_run_and_leaves_nothing(
    tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "adapter"
    with pytest.raises(ConfigError, match=r"the loss is (nan|inf) at step \d") as caught:
        train(options(tiny_llama, data, output, learning_rate=1e30, max_steps=9))
    assert caught.value.hint is not None and "--learning-rate" in caught.value.hint
    assert not output.exists()


def test_a_filled_folder_is_refused_unless_it_is_to_be_replaced(
    tiny_llama: Path, data: Path, full_run: Path, tmp_path: Path
) -> None:
    output = tmp_path / "adapter"
    shutil.copytree(full_run, output)
    with pytest.raises(OutputError, match="is not empty"):
        train(options(tiny_llama, data, output))
    (output / "letter.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"files of no training run:\n  letter.txt"):
        train(options(tiny_llama, data, output, force=True))
    assert (output / "checkpoint-5").is_dir()
    (output / "letter.txt").unlink()
    train(options(tiny_llama, data, output, force=True, max_steps=1))
    assert not list(output.glob("checkpoint-*"))
    with pytest.raises(OutputError, match="is a file"):
        train(options(tiny_llama, data, data))


def test_resuming_with_other_options_or_data_is_refused(
    tiny_llama: Path, data: Path, full_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"batch_size: 2 then, 4 now"):
        train(options(tiny_llama, data, full_run, batch_size=4, resume="auto"))
    other = tmp_path / "other.jsonl"
    other.write_text(data.read_text() + '{"text": "one more"}\n')
    with pytest.raises(ConfigError, match="data_sha256"):
        train(options(tiny_llama, other, full_run, resume="auto"))
    lora = LoRAConfig(r=4, lora_alpha=8, lora_dropout=0.2, target_modules=["q_proj"])
    with pytest.raises(ConfigError, match="target_modules"):
        train(options(tiny_llama, data, full_run, lora=lora, resume="auto"))


class Payload:
    """A pickle that would create a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_broken_and_hostile_checkpoints_are_refused(
    tiny_llama: Path, data: Path, full_run: Path, tmp_path: Path
) -> None:
    output = tmp_path / "adapter"
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        train(options(tiny_llama, data, output, resume="auto"))
    checkpoint = output / "checkpoint-1"
    shutil.copytree(full_run / "checkpoint-1", checkpoint)
    trace = tmp_path / "code-ran"
    with (checkpoint / "optimizer.pdopt").open("wb") as file:
        pickle.dump({"x": Payload(trace)}, file, protocol=4)
    with pytest.raises(CheckpointError, match=r"optimizer\.pdopt"):
        train(options(tiny_llama, data, output, resume="auto"))
    assert not trace.exists()
    (checkpoint / "optimizer.pdopt").unlink()
    with pytest.raises(CheckpointError, match=r"no optimizer\.pdopt"):
        train(options(tiny_llama, data, output, resume=checkpoint))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"dtype": "bfloat16"}, "cannot be trained on the CPU"),
        ({"gradient_accumulation": 6}, "10 examples make only 5"),
        ({"lora": LoRAConfig(target_modules=["q_prj"])}, "q_prj"),
        ({"max_length": 2}, "no example has anything to learn"),
    ],
)
def test_options_that_do_not_go_together(
    tiny_llama: Path, data: Path, tmp_path: Path, wrong: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        train(options(tiny_llama, data, tmp_path / "adapter", **wrong))
    assert not (tmp_path / "adapter").exists()
