"""The command line: parses, calls a workflow, prints. Holds no logic of its own.

Every command is imported when it is called, so that ``--help`` needs nothing but click.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys

import click

from peft_deploy.atomic_folder import remove_unfinished
from peft_deploy.cli._interrupts import Interrupts

__all__ = ["cli", "main"]

_SIGNALLED = 128  # what shells add to the number of the signal that ended a program

# Command → (module, attribute, the line that --help shows). Kept here so that help imports no command.
_COMMANDS = {
    "train": (
        "peft_deploy.cli.train",
        "train_command",
        "Fine-tune a model with LoRA or a prefix.",
    ),
    "export": (
        "peft_deploy.cli.export",
        "export_command",
        "Make an ONNX bundle of a model and its adapter.",
    ),
    "validate": (
        "peft_deploy.cli.validate",
        "validate_command",
        "Check a bundle against the model that it was made of.",
    ),
    "generate": ("peft_deploy.cli.generate", "generate_command", "Generate text with a bundle."),
    "merge": (
        "peft_deploy.cli.merge",
        "merge_command",
        "Write a checkpoint with a LoRA adapter merged into it.",
    ),
    "adapter": ("peft_deploy.cli.adapter", "adapter_command", "Work on adapter folders."),
    "inspect": (
        "peft_deploy.cli.inspect",
        "inspect_command",
        "Say what a checkpoint, an adapter or a bundle is.",
    ),
    "bench": (
        "peft_deploy.cli.bench",
        "bench_command",
        "Measure how fast bundles are, adapters off and on.",
    ),
    "doctor": ("peft_deploy.cli.doctor", "doctor_command", "Check this machine and its packages."),
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, attribute, _ = _COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in _COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="peft-deploy", prog_name="peft-deploy")
def cli() -> None:
    """From a PaddlePaddle model fine-tuned with LoRA to a verified ONNX bundle."""


def main() -> None:
    """Entry point of the ``peft-deploy`` script."""
    # Exceptions, so that what was begun is put away and the converter's process ended.
    interrupts = Interrupts()
    interrupts.install()
    try:
        status = cli.main(prog_name="peft-deploy", standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except click.ClickException as exc:
        exc.show()
        sys.exit(exc.exit_code)
    except (click.Abort, KeyboardInterrupt):
        remove_unfinished()
        click.echo("interrupted; nothing was left half-written", err=True)
        with contextlib.suppress(OSError):  # whoever read it is gone
            sys.stdout.flush()
            sys.stderr.flush()
        # Not sys.exit: where the interrupt met generated code, a dataclass being made, Python remembers it and ends
        # a `python -m` by SIGINT, whatever the status is to be. All that was begun is put away by now.
        os._exit(_SIGNALLED + interrupts.number)
