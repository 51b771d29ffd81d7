"""PaddleNLP's own Trainer, as it is, trains a LoRA model and saves the adapter only."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import paddle
import pytest
from adapters_tiny import bits, fill_branches, logits, tiny_llama
from paddle.utils import unique_name
from paddlenlp.peft import LoRAModel as TheirModel
from paddlenlp.trainer import Trainer, TrainingArguments

from peft_deploy.adapters import read_adapter
from peft_deploy.adapters.lora import LoRAConfig, LoRAModel

pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = 4


class Texts(paddle.io.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        ids = (np.arange(6) * (index + 3) + 5) % 60
        return {"input_ids": ids, "labels": np.roll(ids, -1), "attention_mask": np.ones(6, int)}


def trained(folder: Path, checkpoint: Path | None = None) -> LoRAModel:
    # Optimizers know their state by names that Paddle counts up; a new process starts at 0.
    with unique_name.guard():
        model = LoRAModel(tiny_llama(), LoRAConfig(r=3, target_modules=["q_proj", "v_proj"]))
        fill_branches(model)
        arguments = TrainingArguments(
            output_dir=os.fspath(folder),
            do_train=True,
            max_steps=STEPS,
            save_steps=STEPS // 2,
            learning_rate=0.05,
            per_device_train_batch_size=len(Texts()),  # the Trainer resumes in another order
            disable_tqdm=True,
            report_to=[],
            device="cpu",
            lr_scheduler_type="constant",
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=Texts())
        trainer.train(resume_from_checkpoint=None if checkpoint is None else os.fspath(checkpoint))
    return model


def state(model: LoRAModel) -> dict[str, np.ndarray]:
    return {name: t.numpy().copy() for name, t in model.get_trainable_state_dict().items()}


def test_checkpoints_hold_the_adapter_only_and_resume(tmp_path: Path) -> None:
    model = trained(tmp_path / "run")
    halfway = tmp_path / "run" / f"checkpoint-{STEPS // 2}"
    written = {path.name for path in halfway.iterdir()}
    assert {"lora_model_state.pdparams", "lora_config.json"} <= written
    assert not any(name.startswith("model_state") for name in written)
    stored, end = read_adapter(halfway).state, state(model)
    assert set(stored) == set(end)
    for name, values in end.items():
        assert np.abs(stored[name] - values).max() > 1e-2
    for name, values in state(trained(tmp_path / "again", halfway)).items():
        np.testing.assert_allclose(values, end[name], atol=1e-5)
    loaded = LoRAModel.from_pretrained(tiny_llama(), tmp_path / "run" / f"checkpoint-{STEPS}")
    np.testing.assert_allclose(logits(loaded.eval()), logits(model.eval()), atol=1e-6)
    assert bits(model.restore_original_model()) == bits(tiny_llama())


def test_their_isinstance_and_ours() -> None:
    model = LoRAModel(tiny_llama(), LoRAConfig(r=3, target_modules=["q_proj"]))
    assert isinstance(model, TheirModel)
    assert isinstance(model, LoRAModel)
    assert type(model) is LoRAModel
    assert not isinstance(tiny_llama(), LoRAModel)
