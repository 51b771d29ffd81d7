"""``peft-deploy inspect``: what a folder or a file is."""

from __future__ import annotations

from pathlib import Path

import click

from peft_deploy.cli._common import common_options, emit_json, say


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--verify",
    is_flag=True,
    help="Of a bundle: hash every file, and compare the graph with the manifest.",
)
@common_options
def inspect_command(path: Path, verify: bool, as_json: bool) -> None:
    """Say what a checkpoint, an adapter or a bundle is.

    PATH is a folder, or a single file of weights. Exit code 6 when a bundle's files are not those of its manifest.
    """
    from peft_deploy.errors import BundleError
    from peft_deploy.inspection import BundleInspection, inspect

    found = inspect(path, verify=verify)
    if as_json:
        emit_json(found.to_dict())
    else:
        from peft_deploy.cli._inspection import render

        say(render(found))
    if isinstance(found, BundleInspection) and found.problems:
        if as_json:  # the sheet says it, too
            from rich.text import Text

            for problem in found.problems:
                say(Text(f"error: {problem}", "bold red"))
        click.get_current_context().exit(BundleError.exit_code)
