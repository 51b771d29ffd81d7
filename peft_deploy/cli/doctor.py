"""``peft-deploy doctor``: this machine, its packages, and a small job of each kind."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from peft_deploy.cli._common import common_options, emit_json, say

if TYPE_CHECKING:
    from peft_deploy.diagnosis import Check, Diagnosis


@click.command("doctor")
@click.option("--no-convert", is_flag=True, help="Leave out the tiny conversion.")
@common_options
def doctor_command(no_convert: bool, as_json: bool) -> None:
    """Check this machine: versions, providers, known bad combinations, a tiny conversion.

    Exit code 0 when bundles can be run and nothing that is installed is broken, 2 when something is; when the
    conversion fails, the code of its error.
    """
    found = _diagnose(convert=not no_convert)
    if as_json:
        emit_json(found.to_dict())
    else:
        for check in found.checks:
            _show(check)
        _conclude(found)
    click.get_current_context().exit(found.exit_code)


def _diagnose(*, convert: bool) -> Diagnosis:
    from peft_deploy.diagnosis import check_machine

    found = check_machine()
    if not found.base_works:
        return found  # nothing can be run, and not even the code for it be imported
    from peft_deploy.cli._progress import RichProgress
    from peft_deploy.workflows.doctor import diagnose

    with RichProgress() as progress:
        return diagnose(found, convert=convert, progress=progress)


def _show(check: Check) -> None:
    from rich.text import Text

    marks = {"passed": ("✓", "green"), "failed": ("✗", "bold red"), "info": ("·", "cyan")}
    mark, style = marks[check.verdict.value]
    line = Text.assemble((mark, style), " ", (check.title, "bold"), f": {check.detail}")
    say(line)
    if check.fix:
        say(Text.assemble("    → ", (check.fix, "yellow" if check.failed else "dim")))


def _conclude(found: Diagnosis) -> None:
    failed = sum(check.failed for check in found.checks)
    if not failed:
        say("[green]everything that is installed works[/]")
    else:
        say(f"[bold red]{failed} check{'s' if failed > 1 else ''} failed[/]")
