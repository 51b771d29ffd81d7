"""PaddleNLP's Trainer, taught to train this package's adapters."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import paddle
from paddle import nn
from paddlenlp.trainer import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from peft_deploy.config.json_file import write_json
from peft_deploy.errors import CheckpointError, ConfigError
from peft_deploy.training.batches import Collator, Examples, SeededBatches, step_seed
from peft_deploy.training.callback import Report
from peft_deploy.training.checkpoints import RECORD, checkpoints
from peft_deploy.training.loss import completion_loss
from peft_deploy.training.method import AdapterModel, load_weights
from peft_deploy.training.output import PARTIAL


class AdapterTrainer(Trainer):  # type: ignore[misc]
    """Trains the active adapter of a LoRAModel, or a prefix.

    Differs from its base in what it cannot know or gets wrong for a resumed run: the loss, the
    order of batches, the source of dropout, and how an adapter is saved and loaded.

    Args:
        model: what to train.
        args: PaddleNLP's arguments.
        examples: the training data.
        eval_examples: data that is only measured.
        pad_id: fills up batches.
        record: what the run is made with; goes into every checkpoint.
        report: where progress goes.
    """

    def __init__(
        self,
        model: AdapterModel,
        args: TrainingArguments,
        examples: Examples,
        eval_examples: Examples | None,
        pad_id: int,
        record: Mapping[str, Any],
        report: Report,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            data_collator=Collator(pad_id),
            train_dataset=examples,
            eval_dataset=eval_examples,
            callbacks=[report],
        )
        for drawn in (ProgressCallback, PrinterCallback):
            self.remove_callback(drawn)
        report.watch(self)
        self._record = record
        self._part = 0  # forward passes since the last step
        self._losses: list[float] = []

    def step_loss(self) -> float:
        """The loss of the step that has just been taken."""
        losses, self._losses, self._part = self._losses, [], 0
        return sum(losses)

    def compute_loss(
        self, model: nn.Layer, inputs: dict[str, paddle.Tensor], return_outputs: bool = False
    ) -> Any:
        """The mean cross entropy of the tokens to be learned."""
        loss = completion_loss(model, inputs)
        return (loss, (loss,)) if return_outputs else loss

    def training_step(
        self, model: nn.Layer, inputs: dict[str, paddle.Tensor], step_control: int = 0
    ) -> paddle.Tensor:
        """One forward and backward pass, with dropout that depends on nothing but its place."""
        rank = max(self.args.dataset_rank, 0)
        paddle.seed(step_seed(self.args.seed, self.state.global_step, self._part, rank))
        self._part += 1
        loss = super().training_step(model, inputs, step_control)
        self._losses.append(float(loss))
        return loss

    def _check_loss_valid(self, loss: paddle.Tensor) -> None:
        value = sum(self._losses)
        if not math.isfinite(value):
            raise ConfigError(
                f"the loss is {value} at step {self.state.global_step + 1}, with the learning "
                f"rate {self._get_learning_rate():.2e}",
                hint="lower --learning-rate, or raise --warmup; with float16, try bfloat16",
            )

    def _get_train_sampler(self) -> SeededBatches:
        return SeededBatches(
            self.train_dataset,
            self.args.per_device_train_batch_size,
            self.args.seed,
            self.args.gradient_accumulation_steps,
            max(self.args.dataset_world_size, 1),
            max(self.args.dataset_rank, 0),
        )

    def _save_checkpoint(self, model: nn.Layer, metrics: Any = None) -> None:
        """As the base, but the checkpoint appears under its name when it is complete."""
        output = Path(self.args.output_dir)
        if self.args.should_save:
            shutil.rmtree(output / PARTIAL, ignore_errors=True)
            (output / PARTIAL).mkdir()
        with _output_dir(self.args, output / PARTIAL):
            super()._save_checkpoint(model, metrics)
        if self.args.should_save:
            for written in (output / PARTIAL).iterdir():
                write_json(written / RECORD, self._record)
                shutil.rmtree(output / written.name, ignore_errors=True)
                written.replace(output / written.name)
            shutil.rmtree(output / PARTIAL)
            for old in checkpoints(output)[: -self._keep]:
                shutil.rmtree(old)

    @property
    def _keep(self) -> int:
        return int(self.args.save_total_limit)

    def _save(self, output_dir: str | None = None, state_dict: Any = None, **kwargs: Any) -> None:
        self.model.save_pretrained(
            output_dir or self.args.output_dir, is_main_process=self.args.should_save
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str | None = None) -> None:
        if resume_from_checkpoint is not None:
            load_weights(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        loaded = self.optimizer.state_dict().keys() | self.optimizer._accumulators_holder.keys()
        missing = [
            p.name
            for p in self.model.parameters()
            if not p.stop_gradient and not any(key.startswith(p.name) for key in loaded)
        ]
        if missing:
            raise CheckpointError(
                f"{checkpoint}: the optimizer's state has nothing about {len(missing)} trained "
                f"tensors, {missing[0]} first"
            )

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to do: the batches and dropout follow from seed and step."""


@contextmanager
def _output_dir(args: TrainingArguments, folder: Path) -> Iterator[None]:
    before = args.output_dir, args.output_signal_dir, args.save_total_limit
    args.output_dir = args.output_signal_dir = os.fspath(folder)
    args.save_total_limit = None  # the base must not count checkpoints in the temporary folder
    try:
        yield
    finally:
        args.output_dir, args.output_signal_dir, args.save_total_limit = before
