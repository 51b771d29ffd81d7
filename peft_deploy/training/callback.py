"""What the Trainer tells about itself, passed on to the progress display and ``metrics.jsonl``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paddlenlp.trainer import TrainerCallback

from peft_deploy.progress import Progress
from peft_deploy.training.output import METRICS, write_lines

if TYPE_CHECKING:
    from peft_deploy.training.trainer import AdapterTrainer

_SMOOTHING = 0.8  # weight of the past in the loss beside the bar


class Report(TrainerCallback):  # type: ignore[misc]
    """Moves the progress bar and keeps the metrics.

    Args:
        progress: the display; silent on all ranks but the first.
        folder: the run's folder; None on all ranks but the first, which write no metrics.

    Attributes:
        losses: the loss of every step of this process, in order.
    """

    def __init__(self, progress: Progress, folder: Path | None) -> None:
        self._progress = progress
        self._path = None if folder is None else folder / METRICS
        self._trainer: AdapterTrainer | None = None
        self._entries: list[dict[str, Any]] = []
        self._shown = 0.0
        self.losses: list[float] = []

    def watch(self, trainer: AdapterTrainer) -> None:
        """Takes the losses of single steps from a trainer."""
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Opens the bar; a resumed run starts in the middle of it."""
        self._progress.phase("Training", state.max_steps, "steps")
        if state.global_step:
            self._progress.advance(state.global_step, f"resumed at step {state.global_step}")
        if self._path is not None and self._path.is_file():
            lines = map(json.loads, self._path.read_text("utf-8").splitlines())
            self._entries = [e for e in lines if e["step"] <= state.global_step]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves the bar by one step."""
        if self._trainer is None:
            return
        loss = self._trainer.step_loss()
        self.losses.append(loss)
        first = len(self.losses) == 1
        self._shown = loss if first else _SMOOTHING * self._shown + (1 - _SMOOTHING) * loss
        self._progress.advance(1, f"loss {self._shown:.3f}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keeps a line of metrics."""
        kept = ("loss", "learning_rate", "eval_loss", "progress_or_epoch")
        entry = {key: logs[key] for key in kept if key in (logs or {})}
        if self._path is not None and ("loss" in entry or "eval_loss" in entry):
            epoch = entry.pop("progress_or_epoch", None)
            self._entries.append({"step": state.global_step, "epoch": epoch, **entry})
            write_lines(self._path, self._entries)
