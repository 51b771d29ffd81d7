"""``peft-deploy adapter``: what is done with adapters alone."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from peft_deploy.cli._common import common_options, emit_json, say


@click.group("adapter")
def adapter_command() -> None:
    """Work on adapter folders, without a base model's weights."""


@adapter_command.command("merge-shards")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("output", metavar="DST", type=click.Path(path_type=Path))
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="The base model's config.json or folder; DIR/config.json when not given.",
)
@common_options
def merge_shards_command(folder: Path, output: Path, config: Path | None, as_json: bool) -> None:
    """Put the files of tensor-parallel ranks in DIR together, to an adapter for one card in DST."""
    from peft_deploy.workflows.shards import merge_adapter_shards

    result = merge_adapter_shards(folder, output, config=config)
    if as_json:
        emit_json({**asdict(result), "output": str(result.output)})
    else:
        say(
            f"{result.output}: {result.degree} ranks put together, {result.modules} modules, "
            f"{result.replaced} replaced tensors"
        )
