"""``peft-deploy validate``: a bundle against the model that it was made of."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from peft_deploy.cli._common import common_options, emit_json, say

if TYPE_CHECKING:
    from peft_deploy.parity import ParityReport


@click.command("validate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--base", required=True, metavar="DIR", help="The base model, or a name to download."
)
@click.option("--adapter", metavar="DIR", help="The LoRA adapter that was merged into the bundle.")
@click.option("--provider", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random tokens.")
@click.option(
    "--report",
    "report_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write every output of every case to a JSON file.",
)
@common_options
def validate_command(
    bundle: Path,
    base: str,
    adapter: str | None,
    provider: str,
    seed: int,
    report_file: Path | None,
    as_json: bool,
) -> None:
    """Check that a bundle computes what its base model and adapter compute in Paddle.

    Exit code 7 when it does not.
    """
    from peft_deploy.cli._progress import RichProgress
    from peft_deploy.errors import OutputError, ParityError
    from peft_deploy.workflows.validate import validate

    if report_file is not None and not report_file.parent.is_dir():
        raise OutputError(f"the report's folder {report_file.parent} does not exist")
    with RichProgress() as progress:
        report = validate(
            bundle, base, adapter=adapter, provider=provider, seed=seed, progress=progress
        )
    if report_file is not None:
        write_report(report_file, report)
    say(report.table())
    if as_json:
        emit_json(report.to_dict())
    if not report.passed:
        click.get_current_context().exit(ParityError.exit_code)


def write_report(path: Path, report: ParityReport) -> None:
    """The whole report as JSON, written beside its place and then moved there.

    Raises:
        OutputError: the file cannot be written.
    """
    from peft_deploy.errors import OutputError

    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    text = json.dumps(report.to_dict(full=True), indent=2, ensure_ascii=False, allow_nan=False)
    try:
        temporary.write_text(text + "\n", "utf-8")
        temporary.replace(path)
    except OSError as exc:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"the report {path} cannot be written: {exc.strerror}") from exc
