"""``peft-deploy merge``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import click

from peft_deploy.cli._common import common_options, emit_json, say
from peft_deploy.config.merge import DEFAULT_SHARD_SIZE, DTYPES, LAYOUTS

if TYPE_CHECKING:
    from peft_deploy.workflows.merge import MergeResult


@click.command("merge")
@click.option(
    "--base", required=True, help="Base model: a folder, or a name that PaddleNLP can download."
)
@click.option("--adapter", required=True, metavar="[NAME=]DIR", help="LoRA adapter to merge.")
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="The new checkpoint's folder."
)
@click.option(
    "--to",
    type=click.Choice(LAYOUTS),
    help="PaddleNLP's or Hugging Face's layout; the base model's own when not given.",
)
@click.option(
    "--dtype", type=click.Choice(DTYPES), help="Of the weights; as they are when not given."
)
@click.option(
    "--max-shard-size",
    default=DEFAULT_SHARD_SIZE,
    show_default=True,
    help="Size of the data in one file: 5GB, 500MB, 2GiB.",
)
@click.option("--force", is_flag=True, help="Replace the merged checkpoint that is there.")
@common_options
def merge_command(
    base: str,
    adapter: str,
    output: Path,
    to: str | None,
    dtype: str | None,
    max_shard_size: str,
    force: bool,
    as_json: bool,
) -> None:
    """Write a checkpoint of the base model with a LoRA adapter merged into its weights.

    It is read back and compared with the merge, computed anew, before it is put in place.
    """
    from peft_deploy.cli._progress import RichProgress
    from peft_deploy.config.merge import MergeOptions
    from peft_deploy.workflows.merge import merge

    options = MergeOptions(to=to, dtype=dtype, max_shard_size=max_shard_size, force=force)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            with RichProgress() as progress:
                result = merge(base, adapter, output, options=options, progress=progress)
        finally:
            for warning in caught:
                _warn(str(warning.message))
    if as_json:
        emit_json({**result.to_dict(), "warnings": [str(w.message) for w in caught]})
    else:
        _show(result)


def _warn(message: str) -> None:
    from rich.markup import escape

    say(f"[bold yellow]warning:[/] {escape(message)}")


def _show(result: MergeResult) -> None:
    losses = result.rounding_loss.values()
    lost = f"; rounding lost at most {max(losses):.3f} of a tensor's change" if losses else ""
    say(
        f"{result.output}: {result.tensors} tensors, {result.nbytes / 1e6:,.0f} MB of {result.dtype} in "
        f"{result.layout} layout, [green]read back and equal bit for bit[/]{lost}"
    )
