"""``peft-deploy adapter``: what is done with adapters alone."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from peft_deploy.cli._common import common_options, emit_json, say


@click.group("adapter")
def adapter_command() -> None:
    """Convert adapters, put the files of tensor-parallel ranks together."""


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


@adapter_command.command("convert")
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.argument("output", metavar="DST", type=click.Path(path_type=Path))
@click.option(
    "--to",
    required=True,
    type=click.Choice(["paddle", "hf", "onnx"]),
    help="PaddleNLP's folder, Hugging Face PEFT's, or an .onnx_adapter file; a prefix's .safetensors, too.",
)
@click.option("--base", help="The base model's folder; or give --for.")
@click.option(
    "--for",
    "bundle",
    metavar="BUNDLE",
    type=click.Path(path_type=Path),
    help="A bundle of the base model. An .onnx_adapter file is fitted to the slots of its graph, also from "
    "another such file; other runtimes than peft-deploy's need that.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Of the tensors; as they are when not given, for onnx the graph's.",
)
@click.option("--force", is_flag=True, help="Replace what is there.")
@common_options
def convert_command(
    source: Path,
    output: Path,
    to: str,
    base: str | None,
    bundle: Path | None,
    dtype: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write the adapter SRC to DST in another format; what SRC is in is read from its files.

    What was written is read back and compared before it is put in place.
    """
    from peft_deploy.workflows.convert_adapter import convert_adapter

    result = convert_adapter(
        source, output, to=to, base=base, bundle=bundle, dtype=dtype, force=force
    )
    if as_json:
        emit_json(result.to_dict())
    else:
        from rich.markup import escape

        say(escape(str(result)))
