"""``peft-deploy validate``: a bundle against the model that it was made of."""

from __future__ import annotations

from pathlib import Path

import click

from peft_deploy.cli._common import common_options, emit_json, layers_option, say


@click.command("validate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--base",
    metavar="DIR",
    help="The base model: a folder, or a name to download. Without it, what the bundle recorded takes its place.",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="[NAME=]DIR",
    help="An adapter that the bundle was made with, under the bundle's name for it; repeatable.",
)
@click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="What runs the bundle.",
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Of the random tokens: another one checks with others.",
)
@click.option(
    "--cases",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Prompts of your own to be checked, too: one a line, or .jsonl.",
)
@click.option(
    "--bisect",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Find the layer, module and operators at fault, and put them into a folder that shows it.",
)
@layers_option
@click.option(
    "--report",
    "report_folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write report.json, report.md, junit.xml and report.html into a folder.",
)
@common_options
def validate_command(
    bundle: Path,
    base: str | None,
    adapters: tuple[str, ...],
    provider: str,
    seed: int,
    cases: Path | None,
    bisect: Path | None,
    validate_layers: int | str | None,
    report_folder: Path | None,
    as_json: bool,
) -> None:
    """Check that a bundle computes what its base model and adapters compute in Paddle; exit code 7 when it does not.

    Give the --base and the --adapter that it was exported with. A bundle that was exported with --record-reference
    needs neither of them, and no Paddle.
    """
    from peft_deploy.cli._progress import RichProgress
    from peft_deploy.errors import ParityError
    from peft_deploy.parity.reports import check_report_folder
    from peft_deploy.workflows.bisect import can_bisect
    from peft_deploy.workflows.parity_reports import save_reports
    from peft_deploy.workflows.validate import validate

    if report_folder is not None:
        check_report_folder(report_folder)
    with RichProgress() as progress:
        report = validate(
            bundle,
            base,
            adapter=adapters or None,
            provider=provider,
            seed=seed,
            cases=cases,
            bisect=bisect,
            layers=validate_layers,
            progress=progress,
        )
    if report_folder is not None:
        save_reports(report_folder, bundle, report)
    say(report.table())
    if as_json:
        emit_json(report.to_dict())
    if not report.passed:
        if base is not None and bisect is None and can_bisect(bundle):
            say(
                "[bold]hint:[/]  --bisect DIR finds the layer, the module and the operators at fault"
            )
        click.get_current_context().exit(ParityError.exit_code)
