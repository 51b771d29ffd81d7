"""One training run from start to end."""

from __future__ import annotations

from peft_deploy.environment import debugging, require_paddle

require_paddle("training")

import hashlib
import os
import time
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle.utils import unique_name
from paddlenlp.trainer import TrainingArguments

from peft_deploy.base import BaseModel, open_base
from peft_deploy.config.json_file import make_folder, write_json
from peft_deploy.errors import ConfigError
from peft_deploy.families import DecoderFamily
from peft_deploy.progress import Progress, Silent
from peft_deploy.text import Tokenizer
from peft_deploy.training.batches import Examples
from peft_deploy.training.callback import Report
from peft_deploy.training.checkpoints import RECORD, checkpoints, find_checkpoint
from peft_deploy.training.encoding import Encoded, encode_records
from peft_deploy.training.method import (
    AdapterModel,
    adapter_config,
    build_model,
    longest_example,
)
from peft_deploy.training.options import TrainOptions
from peft_deploy.training.output import check_output, clear_output
from peft_deploy.training.records import read_records
from peft_deploy.training.trainer import AdapterTrainer

# PaddleNLP's plain "constant" knows no warmup.
_SCHEDULERS = {"constant": "constant_with_warmup"}


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a training run came to.

    Args:
        output: the adapter's folder.
        steps: all steps behind the adapter, those before a resumption included.
        examples: examples that were trained on.
        trained_parameters: number of values that the adapter has.
        first_loss: of the first step of this process.
        last_loss: mean over the last steps of this process, ten at most.
        eval_loss: on the evaluation data after the last step; None without such data.
        remarks: what the user should know, such as examples that were cut.
        seconds: wall time of the training steps.
        main_process: whether this is the process that wrote the adapter; with several devices,
            the others are not.
        model: the model with its adapter, in memory.
    """

    output: Path
    steps: int
    examples: int
    trained_parameters: int
    first_loss: float
    last_loss: float
    eval_loss: float | None
    remarks: tuple[str, ...]
    seconds: float
    main_process: bool = True
    model: AdapterModel = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form, without the model."""
        return {
            "output": str(self.output),
            "steps": self.steps,
            "examples": self.examples,
            "trained_parameters": self.trained_parameters,
            "first_loss": self.first_loss,
            "last_loss": self.last_loss,
            "eval_loss": self.eval_loss,
            "remarks": list(self.remarks),
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class _Data:
    examples: Examples
    evaluated: Examples | None
    pad_id: int
    remarks: tuple[str, ...]


def train(options: TrainOptions, progress: Progress | None = None) -> TrainResult:
    """Fine-tunes an adapter and writes it to ``options.output``.

    Args:
        options: what to train, on what, and how.
        progress: gets a phase for reading, loading and training.

    Raises:
        ConfigError: an option or a line of the data cannot be used, or the loss is not finite.
        OutputError: the output folder is not empty.
        CheckpointError: the base model or the checkpoint to resume from cannot be read.

    Example:
        >>> train(TrainOptions(base="models/smollm2-135m", data=Path("tools/demo_data/train.jsonl"),
        ...     output=Path("adapter"), epochs=2))  # doctest: +SKIP
    """
    # The optimizer's state is kept under the names that Paddle gives to tensors by counting them;
    # counting from 0 makes them the same in every run, so that a resumed run finds its own.
    with warnings.catch_warnings(), unique_name.guard():
        if not debugging():
            # Of one Paddle function that another has replaced, and the like.
            warnings.filterwarnings("ignore", module=r"paddlenlp\.")
        return _train(options, progress)


def _require_decoder(base: BaseModel) -> None:
    if not isinstance(base.family, DecoderFamily):
        raise ConfigError(
            f"{base.name} is a {base.family.paddle_model(base.config)}; what is trained here is a decoder that "
            "continues texts",
            hint="train it with PaddleNLP's own tools; export takes the adapter that they write",
        )


def _train(options: TrainOptions, progress: Progress | None) -> TrainResult:
    first = int(os.environ.get("PADDLE_TRAINER_ID", "0")) == 0
    progress = progress if progress is not None and first else Silent()
    if first:
        check_output(options.output, resume=options.resume is not None, force=options.force)
    _check_device(options.dtype)
    base = open_base(options.base)
    _require_decoder(base)
    progress.phase("Reading the examples")
    data = _read_data(options, base)
    _check_batches(options, len(data.examples))
    adapter = adapter_config(options, base)
    record = {
        **options.fixed(),
        options.method: adapter.to_dict(),
        "data_sha256": hashlib.sha256(options.data.read_bytes()).hexdigest(),
    }
    resume = options.resume
    checkpoint = None if resume is None else find_checkpoint(resume, options.output, record)
    model = build_model(base, adapter, options, progress)
    try:
        return _fit(model, data, options, record, checkpoint, progress, first)
    except BaseException:
        if first and resume is None and not checkpoints(options.output):
            _remove_traces(options.output)
        raise


def _read_data(options: TrainOptions, base: BaseModel) -> _Data:
    tokenizer = Tokenizer.from_folder(base.path)

    def encoded(path: Path) -> Encoded:
        return encode_records(read_records(path), tokenizer, options.max_length, path)

    options = replace(options, max_length=longest_example(options, base))
    trained = encoded(options.data)
    measured = None if options.eval_data is None else encoded(options.eval_data)
    remarks = trained.remarks(options.data, options.max_length)
    if measured is not None and options.eval_data is not None:
        remarks += measured.remarks(options.eval_data, options.max_length)
    return _Data(
        Examples(trained.examples),
        None if measured is None else Examples(measured.examples),
        tokenizer.pad_id,
        tuple(remarks),
    )


def _check_device(dtype: str) -> None:
    if dtype != "float32" and paddle.get_device() == "cpu":
        raise ConfigError(
            f"dtype {dtype} cannot be trained on the CPU: Paddle has no such matrix product there",
            hint="use --dtype float32, or Paddle's GPU build",
        )


def _check_batches(options: TrainOptions, examples: int) -> None:
    ranks = paddle.distributed.get_world_size()
    batches = -(-examples // (options.batch_size * ranks))
    if batches < options.gradient_accumulation:
        raise ConfigError(
            f"one step takes gradient_accumulation {options.gradient_accumulation} batches of "
            f"{options.batch_size} on {ranks} devices, and {examples} examples make only {batches}"
        )


def _arguments(options: TrainOptions) -> TrainingArguments:
    warmup = options.warmup
    measured = options.eval_data is not None
    every = "steps" if options.eval_steps else "epoch"
    return TrainingArguments(
        output_dir=os.fspath(options.output),
        do_train=True,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        learning_rate=options.learning_rate,
        warmup_ratio=warmup if warmup < 1 else 0.0,
        warmup_steps=int(warmup) if warmup >= 1 else 0,
        lr_scheduler_type=_SCHEDULERS.get(options.schedule, options.schedule),
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        seed=options.seed,
        save_strategy="steps" if options.save_steps else "no",
        save_steps=options.save_steps or 0,
        save_total_limit=options.keep_checkpoints,
        logging_steps=options.logging_steps,
        evaluation_strategy=every if measured else "no",
        eval_steps=options.eval_steps,
        bf16=options.dtype == "bfloat16",
        fp16=options.dtype == "float16",
        fp16_opt_level="O2",
        report_to=list(options.report_to),
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        device=paddle.get_device().split(":")[0],
    )


def _fit(
    model: AdapterModel,
    data: _Data,
    options: TrainOptions,
    record: dict[str, Any],
    checkpoint: Path | None,
    progress: Progress,
    first: bool,
) -> TrainResult:
    if first:
        if options.force:
            clear_output(options.output)
        write_json(make_folder(options.output) / RECORD, record)
    arguments = _arguments(options)
    report = Report(progress, options.output if first else None)
    trainer = AdapterTrainer(
        model, arguments, data.examples, data.evaluated, data.pad_id, record, report
    )
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else os.fspath(checkpoint))
    seconds = time.perf_counter() - start
    trained = _check_finite(model)
    eval_loss = None
    if data.evaluated is not None:
        progress.phase("Measuring")
        eval_loss = float(trainer.evaluate()["eval_loss"])
    model.eval()
    model.save_pretrained(options.output, is_main_process=first)
    last = report.losses[-10:]
    return TrainResult(
        output=options.output,
        steps=trainer.state.global_step,
        examples=len(data.examples),
        trained_parameters=trained,
        first_loss=report.losses[0] if last else float("nan"),
        last_loss=sum(last) / len(last) if last else float("nan"),
        eval_loss=eval_loss,
        remarks=data.remarks,
        seconds=seconds,
        main_process=first,
        model=model,
    )


def _check_finite(model: AdapterModel) -> int:
    """The number of trained values, all of which are numbers.

    Raises:
        ConfigError: some are not.
    """
    count = 0
    for name, tensor in model.get_trainable_state_dict().items():
        values = tensor.astype("float32").numpy()
        if not np.isfinite(values).all():
            raise ConfigError(
                f"{name} is not finite after the last step",
                hint="lower --learning-rate, or raise --warmup",
            )
        count += values.size
    return count


def _remove_traces(folder: Path) -> None:
    """Leaves nothing of a run that failed before its first checkpoint."""
    clear_output(folder)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
