"""The options of one training run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft_deploy.config import LoRAConfig, PrefixConfig
from peft_deploy.errors import ConfigError

SCHEDULES = ("linear", "cosine", "constant")
DTYPES = ("float32", "float16", "bfloat16")
REPORTERS = ("visualdl", "tensorboard", "wandb", "swanlab")
METHODS = ("lora", "prefix")
RESUME_LATEST = "auto"
LEAST_LENGTH = 2  # tokens of an example: one, and one to be learned from it

# What may differ between a run and its resumption: none of it changes the steps that are left,
# except for epochs and max_steps, which say how many those are.
_FREE_ON_RESUME = frozenset(
    {
        "output",
        "base",
        "data",
        "eval_data",
        "eval_steps",
        "epochs",
        "max_steps",
        "save_steps",
        "keep_checkpoints",
        "logging_steps",
        "recompute",
        "report_to",
        "resume",
        "force",
    }
)


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What to train, on what, and how.

    Args:
        base: the base model: a folder, or a name that PaddleNLP can download.
        data: a JSONL file of examples.
        output: the adapter's folder; checkpoints go into it, too.
        method: ``"lora"`` or ``"prefix"``.
        lora: the options of a LoRA adapter, rank 8 and alpha 16 when None; without
            ``target_modules`` the family's linear layers are adapted.
        prefix: the options of a prefix; it has to say ``num_prefix_tokens``, and other sizes are
            filled in from the model.
        eval_data: a JSONL file of examples that are only measured.
        eval_steps: steps between two measurements; at the end of every epoch when None.
        epochs: passes over the data; ``max_steps`` goes before it.
        max_steps: number of steps; decided by ``epochs`` when None.
        batch_size: examples in one forward pass, on each device.
        gradient_accumulation: forward passes in one step; batches that fill no step at the end of
            an epoch are left out of it.
        learning_rate: the peak.
        warmup: steps until the peak is reached; below 1 it is a share of all steps.
        schedule: how the learning rate goes on from the peak, one of :data:`SCHEDULES`.
        weight_decay: AdamW's.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them alone.
        max_length: tokens of an example; what is longer is cut at its end.
        seed: of the adapter's first values, the order of examples and dropout.
        save_steps: steps between two checkpoints; none are written when None.
        keep_checkpoints: how many of them stay.
        logging_steps: steps between two lines of ``metrics.jsonl``.
        recompute: compute every layer's activations again for the gradients instead of keeping them;
            saves memory and costs about a third more time.
        dtype: of the base model's weights; 16-bit types need a GPU.
        report_to: services that also get the metrics, of :data:`REPORTERS`.
        resume: a checkpoint's folder, or ``"auto"`` for the latest one in ``output``.
        force: replace an earlier run's output.

    Raises:
        ConfigError: a value is out of range.
    """

    base: str | Path
    data: Path
    output: Path
    method: str = "lora"
    lora: LoRAConfig | None = None
    prefix: PrefixConfig | None = None
    eval_data: Path | None = None
    eval_steps: int | None = None
    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 4
    gradient_accumulation: int = 1
    learning_rate: float = 3e-4
    warmup: float = 0.03
    schedule: str = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int = 1024
    seed: int = 42
    save_steps: int | None = None
    keep_checkpoints: int = 2
    logging_steps: int = 10
    recompute: bool = False
    dtype: str = "float32"
    report_to: tuple[str, ...] = ()
    resume: str | Path | None = None
    force: bool = False

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        self._check_adapter()
        for name in ("eval_steps", "max_steps", "save_steps"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name))
        for name in (
            "batch_size",
            "gradient_accumulation",
            "keep_checkpoints",
            "logging_steps",
        ):
            _whole(name, getattr(self, name))
        _whole("max_length", self.max_length, least=LEAST_LENGTH)
        _whole("seed", self.seed, least=0, most=2**32 - 1)
        _number("epochs", self.epochs, above=0)
        _number("learning_rate", self.learning_rate, above=0)
        for name in ("warmup", "weight_decay", "max_grad_norm"):
            _number(name, getattr(self, name))
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("dtype", self.dtype, DTYPES)
        for reporter in self.report_to:
            _one_of("report_to", reporter, REPORTERS)
        if self.resume is not None and self.force:
            raise ConfigError(
                "resume and force exclude each other: one keeps the earlier run, one replaces it"
            )

    def _check_adapter(self) -> None:
        """Leaves exactly one of ``lora`` and ``prefix``, that of the method."""
        other = "prefix" if self.method == "lora" else "lora"
        if getattr(self, other) is not None:
            raise ConfigError(
                f"method is {self.method!r}, but options of {other} are given",
                hint=f"leave them out, or train with the method {other!r}",
            )
        if self.method == "lora":
            if self.lora is None:
                object.__setattr__(self, "lora", LoRAConfig(r=8, lora_alpha=16))
            return
        if self.prefix is None or self.prefix.num_prefix_tokens is None:
            raise ConfigError(
                "the method 'prefix' needs num_prefix_tokens, the length of the prefix",
                hint="16 to 128 are usual",
            )
        if self.prefix.prefix_projection_hidden_size and not self.prefix.prefix_projection:
            raise ConfigError(
                f"prefix_projection_hidden_size is {self.prefix.prefix_projection_hidden_size}, "
                "and there is no projection",
                hint="give prefix_projection, too",
            )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        plain = {
            key: str(value) if isinstance(value, Path) else value
            for key, value in asdict(self).items()
        }
        return {**plain, "report_to": list(self.report_to)}

    def fixed(self) -> dict[str, Any]:
        """The entries of :meth:`to_dict` that a resumed run has to share with the first one."""
        return {key: value for key, value in self.to_dict().items() if key not in _FREE_ON_RESUME}


def _whole(name: str, value: object, least: int = 1, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} is {value!r}; it has to be a whole number of at least {least}")
    if most is not None and value > most:
        raise ConfigError(f"{name} is {value!r}; it has to be at most {most}")


def _number(name: str, value: object, above: float | None = None) -> None:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or value < 0:  # type: ignore[arg-type, operator]
        raise ConfigError(f"{name} is {value!r}; it has to be a finite number, not below 0")
    if above is not None and value <= above:  # type: ignore[operator]
        raise ConfigError(f"{name} is {value!r}; it has to be above {above}")


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name} is {value!r}; it has to be one of {', '.join(known)}")
