"""``peft-deploy train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from peft_deploy.cli._common import common_options, emit_json, say

if TYPE_CHECKING:
    from peft_deploy.training import TrainOptions, TrainResult

_FILE = click.Path(path_type=Path)
# Said before Paddle is imported, which takes seconds.
_DATA = click.Path(exists=True, dir_okay=False, path_type=Path)

_LORA = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "rslora",
    "pissa",
    "lora_plus_scale",
)
_PREFIX = (
    "num_prefix_tokens",
    "prefix_projection",
    "prefix_projection_hidden_size",
    "prefix_dropout",
)


@click.command("train")
@click.option(
    "--base", required=True, help="Base model: a folder, or a name that PaddleNLP can download."
)
@click.option("--method", type=click.Choice(["lora", "prefix"]), default="lora", show_default=True)
@click.option("--data", required=True, type=_DATA, help="JSONL file of examples.")
@click.option("--output", required=True, type=_FILE, help="The adapter's folder.")
# paddle.distributed.launch takes --r for an abbreviation of options of its own.
@click.option(
    "--r", "--lora-r", "r", type=int, default=8, show_default=True, help="Rank of the adapter."
)
@click.option("--lora-alpha", type=float, default=16, show_default=True, help="Scaling times r.")
@click.option("--lora-dropout", type=float, default=0.0, show_default=True)
@click.option(
    "--target-modules",
    multiple=True,
    metavar="PATTERN",
    help="Name or regular expression of the layers to adapt; may be repeated. "
    "All linear layers of the decoder by default.",
)
@click.option("--rslora", is_flag=True, help="Scale by alpha/sqrt(r).")
@click.option("--pissa", is_flag=True, help="Start from the principal part of the weights.")
@click.option("--lora-plus-scale", type=float, default=1.0, show_default=True)
@click.option("--num-prefix-tokens", type=int, help="Length of the prefix.")
@click.option(
    "--prefix-projection", is_flag=True, help="Make the prefix with two linear layers and a tanh."
)
@click.option(
    "--prefix-projection-hidden-size",
    type=int,
    help="Width between those layers; the model's own by default.",
)
@click.option("--prefix-dropout", type=float, default=0.0, show_default=True)
@click.option("--epochs", type=float, default=3.0, show_default=True, help="Passes over the data.")
@click.option("--max-steps", type=int, help="Number of steps; goes before --epochs.")
@click.option("--batch-size", type=int, default=4, show_default=True)
@click.option("--gradient-accumulation", type=int, default=1, show_default=True)
@click.option("--learning-rate", type=float, default=3e-4, show_default=True)
@click.option(
    "--warmup", type=float, default=0.03, show_default=True, help="Steps; a share if below 1."
)
@click.option(
    "--schedule",
    type=click.Choice(["linear", "cosine", "constant"]),
    default="linear",
    show_default=True,
)
@click.option("--weight-decay", type=float, default=0.0, show_default=True)
@click.option("--max-grad-norm", type=float, default=1.0, show_default=True)
@click.option(
    "--max-length", type=int, default=1024, show_default=True, help="Tokens of an example."
)
@click.option("--seed", type=int, default=42, show_default=True)
@click.option("--eval-data", type=_DATA, help="JSONL file of examples that are only measured.")
@click.option("--eval-steps", type=int, help="Steps between measurements; each epoch by default.")
@click.option("--save-steps", type=int, help="Steps between checkpoints; none by default.")
@click.option("--keep-checkpoints", type=int, default=2, show_default=True)
@click.option("--logging-steps", type=int, default=10, show_default=True)
@click.option(
    "--recompute",
    is_flag=True,
    help="Compute activations twice instead of keeping them: less memory, more time.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Of the base model's weights.",
)
@click.option(
    "--report-to",
    multiple=True,
    type=click.Choice(["visualdl", "tensorboard", "wandb", "swanlab"]),
    help="Send the metrics there, too; may be repeated.",
)
@click.option(
    "--resume",
    metavar="DIR|auto",
    is_flag=False,
    flag_value="auto",
    help="Go on from a checkpoint; from the latest one in --output when no folder is given.",
)
@click.option("--force", is_flag=True, help="Replace an earlier run's output.")
@common_options
def train_command(as_json: bool, **options: Any) -> None:
    """Fine-tune a model with LoRA or a prefix on a JSONL file of examples.

    Each line is {"prompt": …, "completion": …}, {"text": …} or {"messages": [{"role": …,
    "content": …}, …]}. The loss counts what the model has to say: the completion, the whole text,
    the assistant's turns.

    On several devices: python -m paddle.distributed.launch "$(which peft-deploy)" train …, where
    the rank is called --lora-r.
    """
    from peft_deploy.cli._progress import RichProgress
    from peft_deploy.environment import require_paddle
    from peft_deploy.training import read_records

    chosen = _options(options)
    for path in filter(None, (chosen.data, chosen.eval_data)):
        read_records(path)  # a bad line is said before Paddle is imported, which takes seconds
    with RichProgress() as progress:
        progress.phase("Importing Paddle")
        require_paddle("training")
        from peft_deploy.training import train

        result = train(chosen, progress)
    if not result.main_process:
        return
    if as_json:
        emit_json(result.to_dict())
    else:
        _show(result)


def _options(given: dict[str, Any]) -> TrainOptions:
    from peft_deploy.config import LoRAConfig, PrefixConfig
    from peft_deploy.training import TrainOptions

    _refuse_options_of_the_other(given["method"])
    lora = {key: given.pop(key) for key in _LORA}
    prefix = {key: given.pop(key) for key in _PREFIX}
    given["report_to"] = tuple(given["report_to"])
    if given["method"] == "prefix":
        return TrainOptions(**given, prefix=PrefixConfig(**prefix))
    lora["target_modules"] = list(lora["target_modules"]) or None
    return TrainOptions(**given, lora=LoRAConfig(**lora, base_model_name_or_path=given["base"]))


def _refuse_options_of_the_other(method: str) -> None:
    context = click.get_current_context()
    foreign = _PREFIX if method == "lora" else _LORA
    given = [
        max(parameter.opts, key=len)
        for parameter in context.command.params
        if parameter.name in foreign
        and context.get_parameter_source(parameter.name) is not click.core.ParameterSource.DEFAULT
    ]
    if given:
        raise click.UsageError(f"--method {method} has no {', '.join(given)}")


def _show(result: TrainResult) -> None:
    for remark in result.remarks:
        say(f"[yellow]note:[/] {remark}")
    measured = "" if result.eval_loss is None else f", {result.eval_loss:.3f} on the other data"
    say(
        f"{result.output}: {result.trained_parameters:,} parameters trained on "
        f"{result.examples} examples in {result.steps} steps, {result.seconds:.0f} s; "
        f"loss {result.first_loss:.3f} → {result.last_loss:.3f}{measured}"
    )
