"""PaddleNLP's own Trainer, as it is, trains a prefix model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from paddle.utils import unique_name
from paddlenlp.peft import PrefixModelForCausalLM as TheirModel
from paddlenlp.trainer import Trainer, TrainingArguments
from prefix_tiny import prefixed, run, tiny

from peft_deploy.adapters.formats.prefix import read_prefix
from peft_deploy.adapters.prefix import PrefixModelForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore")


class Texts(paddle.io.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        ids = (np.arange(6) * (index + 3) + 5) % 60
        return {"input_ids": ids, "labels": np.roll(ids, -1), "attention_mask": np.ones(6, int)}


def trainer(model: Any, folder: Path, **options: Any) -> Trainer:
    given = {
        "max_steps": 6,
        "save_steps": 3,
        "learning_rate": 0.1,
        "per_device_train_batch_size": len(Texts()),  # the Trainer resumes in another order
        "logging_steps": 2,
        "disable_tqdm": True,
        "report_to": [],
        "device": "cpu",
        "lr_scheduler_type": "constant",
        **options,
    }
    arguments = TrainingArguments(output_dir=os.fspath(folder), do_train=True, **given)
    return Trainer(model=model, args=arguments, train_dataset=Texts())


def encoder(model: Any) -> dict[str, np.ndarray]:
    return {n: t.numpy().copy() for n, t in model.prefix_encoder.state_dict().items()}


def loss(model: Any) -> float:
    """The mean loss over all texts, without dropout."""
    texts = [Texts()[i] for i in range(len(Texts()))]
    batch = {key: paddle.to_tensor(np.stack([text[key] for text in texts])) for key in texts[0]}
    with paddle.no_grad():
        return float(model.eval()(**batch)[0])


def trained(
    projection: bool, folder: Path, checkpoint: Path | None = None, dropout: float = 0.0
) -> Any:
    """A model that has been trained, its encoder's start, and the run."""
    # Optimizers know their state by names that Paddle counts up; a new process starts at 0.
    with unique_name.guard():
        model = prefixed(prefix_projection=projection, prefix_dropout=dropout)
        start, made = encoder(model), trainer(model, folder)
        made.train(resume_from_checkpoint=None if checkpoint is None else os.fspath(checkpoint))
    return model, start, made


@pytest.mark.parametrize("projection", [False, True])
def test_checkpoints_hold_the_prefix_and_resume(projection: bool, tmp_path: Path) -> None:
    model, start, run_of = trained(projection, tmp_path / "run")
    assert run_of.state.global_step == 6
    assert loss(model) < 0.9 * loss(prefixed(prefix_projection=projection))
    end = encoder(model)
    assert all(np.abs(end[name] - start[name]).max() > 1e-2 for name in start)
    untouched = dict(tiny("llama").named_parameters())
    for name, parameter in model.model.named_parameters():
        np.testing.assert_array_equal(parameter.numpy(), untouched[name].numpy())

    folder = tmp_path / "run" / "checkpoint-3"
    written = {path.name for path in folder.iterdir()}
    assert {"prefix_model_state.pdparams", "prefix_config.json", "pre_caches.npy"} <= written
    assert not any(name.startswith("model_state") for name in written)
    halfway = read_prefix(folder)
    assert set(halfway.state) == set(start)
    assert np.abs(np.asarray(halfway.state["0.weight"]) - end["0.weight"]).max() > 1e-2

    resumed, _, again = trained(projection, tmp_path / "again", folder)
    assert again.state.global_step == 6
    for name, values in encoder(resumed).items():
        np.testing.assert_allclose(values, end[name], atol=1e-5)

    loaded = PrefixModelForCausalLM.from_pretrained(
        tiny("llama"), tmp_path / "run" / "checkpoint-6"
    )
    np.testing.assert_array_equal(run(loaded.eval()), run(model.eval()))


@pytest.mark.filterwarnings("error:.*saved in training mode")
def test_no_dropout_in_the_pre_caches_of_a_checkpoint(tmp_path: Path) -> None:
    """The Trainer saves while the model is in training mode."""
    trained(True, tmp_path, dropout=0.5)
    read = read_prefix(tmp_path / "checkpoint-3")
    caches = np.load(tmp_path / "checkpoint-3" / "pre_caches.npy")
    assert read.config.prefix_dropout == 0.5 and (caches != 0).all()
    np.testing.assert_allclose(caches, read.pre_caches(), atol=1e-6)


def test_their_isinstance_and_ours() -> None:
    model = prefixed()
    assert isinstance(model, TheirModel) and isinstance(model, PrefixModelForCausalLM)
    assert type(model) is PrefixModelForCausalLM
    assert not isinstance(tiny("llama"), PrefixModelForCausalLM)
